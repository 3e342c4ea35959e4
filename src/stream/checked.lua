-- A commit's signature has been checked.
--
-- KEYS: unchecked, repairs, heads (their number), the bucket of the account's head, missed.
-- ARGV: the account, the commit that was checked, the account's field in the bucket, a head and key of which only the key
--       counts (25 bytes if there is none), the repair as JSON ('' for none), the most repairs.
-- Returns 1, or 0 if another commit is to be checked by now.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
    return 0
end
redis.call('HDEL', KEYS[1], ARGV[1])
if ARGV[5] ~= '' then
    if redis.call('HLEN', KEYS[2]) < tonumber(ARGV[6]) then
        redis.call('HSET', KEYS[2], ARGV[1], ARGV[5])
    else
        redis.call('HINCRBY', KEYS[5], 'no_room', 1)
    end
end
if #ARGV[4] > 25 then
    local known = redis.call('HGET', KEYS[4], ARGV[3]) or ARGV[4]
    if redis.call('HSET', KEYS[4], ARGV[3], string.sub(known, 1, 25) .. string.sub(ARGV[4], 26)) == 1 then
        redis.call('INCRBY', KEYS[3], 1)
    end
end
return 1
