-- Advances an output past the entries that it has published, if we still hold its lease and its position has not changed.
--
-- KEYS: stream, lease, watch.
-- ARGV: the output's group, our lease, where it was, where it is to be, the number of entries in between, the lease's life in
--       milliseconds.
-- Returns 1, or 0 if it is not.
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[2] or redis.call('EXISTS', KEYS[1]) == 0 then
    return 0
end
-- Once it has written anything, Redis lets a script finish even when its memory is full. A lease that ran out without being taken
-- is ours.
redis.call('HDEL', KEYS[3], '')
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[6])
for _, group in ipairs(groups_of(KEYS[1])) do
    if group['name'] == ARGV[1] and group['last-delivered-id'] == ARGV[3] then
        set_output(KEYS[1], group, ARGV[4], ARGV[5])
        return 1
    end
end
return 0
