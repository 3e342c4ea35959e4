-- Where an output is.
--
-- KEYS: stream. ARGV: the output's group.
-- Returns the last entry that it was given, 0-0 if there is none, '' without a stream. Creates the group if it does not exist.
if redis.call('EXISTS', KEYS[1]) == 0 then
    return ''
end
for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local group = {}
    for i = 1, #info, 2 do
        group[info[i]] = info[i + 1]
    end
    if group['name'] == ARGV[1] then
        return group['last-delivered-id']
    end
end
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0')
return '0-0'
