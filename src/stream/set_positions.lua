-- Sets positions of an origin, and records gaps, if we still hold its lease and none of them was moved by others.
--
-- KEYS: positions, missed, gaps, the origin's lease.
-- ARGV: our lease, the id of the source, the number of gaps and each as JSON, then for each partition its name, where it was
--       ('' for nowhere), and where it is to be.
-- Returns 1, or 0 if it did not. Positions in another source of the same name are forgotten.
if redis.call('GET', KEYS[4]) ~= ARGV[1] then
    return 0
end
local source = redis.call('HGET', KEYS[1], 'source') or ARGV[2]
local first = 4 + tonumber(ARGV[3])
if source == ARGV[2] then
    for i = first, #ARGV, 3 do
        if (redis.call('HGET', KEYS[1], ARGV[i]) or '') ~= ARGV[i + 1] then
            return 0
        end
    end
else
    redis.call('DEL', KEYS[1])
end
redis.call('HSET', KEYS[1], 'source', ARGV[2])
for i = 4, first - 1 do
    redis.call('HINCRBY', KEYS[2], 'gap', 1)
    redis.call('LPUSH', KEYS[3], ARGV[i])
    redis.call('LTRIM', KEYS[3], 0, 99)
end
for i = first, #ARGV, 3 do
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 2])
end
return 1
