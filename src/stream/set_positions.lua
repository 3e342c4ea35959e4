-- Sets the positions of an origin, and records gaps.
--
-- KEYS: positions, missed, gaps.
-- ARGV: the id of the source, the number of gaps and each as JSON, then partitions and their positions.
if redis.call('HGET', KEYS[1], 'source') ~= ARGV[1] then
    redis.call('DEL', KEYS[1])
    redis.call('HSET', KEYS[1], 'source', ARGV[1])
end
local first = 3 + tonumber(ARGV[2])
for i = 3, first - 1 do
    redis.call('HINCRBY', KEYS[2], 'gap', 1)
    redis.call('LPUSH', KEYS[3], ARGV[i])
    redis.call('LTRIM', KEYS[3], 0, 99)
end
for i = first, #ARGV, 2 do
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
end
