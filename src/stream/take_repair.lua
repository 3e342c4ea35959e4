-- A repository to repair has been noted in the database. If the reason is another one by now, it stays.
--
-- KEYS: repairs. ARGV: the account, the reason as JSON.
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then
    redis.call('HDEL', KEYS[1], ARGV[1])
end
