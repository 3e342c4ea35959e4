-- Where an output is.
--
-- KEYS: stream, watch. ARGV: the output's group.
-- Returns the last entry that it was given, 0-0 if there is none, '' without a stream. Creates the group if it does not exist.
if redis.call('EXISTS', KEYS[1]) == 0 then
    return ''
end
for _, group in ipairs(groups_of(KEYS[1])) do
    if group['name'] == ARGV[1] then
        return group['last-delivered-id']
    end
end
-- Once a script has written anything, Redis lets it finish even when its memory is full.
redis.call('HDEL', KEYS[2], '')
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0')
return '0-0'
