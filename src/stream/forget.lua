-- Forgets the accounts in some buckets.
--
-- KEYS: heads (their number), the buckets.
local gone = 0
for i = 2, #KEYS do
    gone = gone + redis.call('HLEN', KEYS[i])
    redis.call('DEL', KEYS[i])
end
redis.call('INCRBY', KEYS[1], -gone)
