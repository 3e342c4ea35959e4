-- Acknowledges entries that somebody removed while they were pending, and sends the reader back for them.
--
-- KEYS: stream, relay, watch (see janitor.lua).  ARGV: group, ids.
--
-- XACK comes first: when its memory is full, Redis refuses HSET, but not in a script that has already written. The ids
-- go one by one, because there may be more than Lua can pass at once.
local count = 0
for i = 2, #ARGV do
    count = count + redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
end
if redis.call('EXISTS', KEYS[2]) == 1 then
    redis.call('HSET', KEYS[3], 'due', 1)
end
return count
