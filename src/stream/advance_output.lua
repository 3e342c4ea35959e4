-- Advances an output past the entries that it has published, if we still hold its lease and nobody has set it back.
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
local function before(a, b)
    local a_ms, a_seq = string.match(a, '^(%d+)-(%d+)$')
    local b_ms, b_seq = string.match(b, '^(%d+)-(%d+)$')
    a_ms, b_ms = tonumber(a_ms), tonumber(b_ms)
    return a_ms < b_ms or (a_ms == b_ms and tonumber(a_seq) < tonumber(b_seq))
end
for _, group in ipairs(groups_of(KEYS[1])) do
    local at = group['last-delivered-id']
    if group['name'] == ARGV[1] and not before(at, ARGV[3]) then
        if at == ARGV[3] then
            set_output(KEYS[1], group, ARGV[4], ARGV[5])
        elseif before(at, ARGV[4]) then
            -- The janitor has moved it (OUT_MAX_LAG).
            local left = redis.call('XRANGE', KEYS[1], '(' .. at, ARGV[4], 'COUNT', ARGV[5])
            set_output(KEYS[1], group, ARGV[4], #left)
        end
        return 1
    end
end
return 0
