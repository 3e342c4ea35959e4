-- Removes consumers that have nothing pending and have been idle for long.
--
-- KEYS: stream.  ARGV: group, idle time in milliseconds, a name ('' for all).  Returns how many.
local removed = 0
for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
    local consumer = {}
    for i = 1, #info, 2 do
        consumer[info[i]] = info[i + 1]
    end
    if consumer['pending'] == 0 and consumer['idle'] >= tonumber(ARGV[2])
        and (ARGV[3] == '' or ARGV[3] == consumer['name']) then
        redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer['name'])
        removed = removed + 1
    end
end
return removed
