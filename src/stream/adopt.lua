-- A repository has been compared: its newest commit is the account's head, unless there is one. What is missing between it and
-- the account's next commit then shows.
--
-- KEYS: heads (their number), the bucket of the account.
-- ARGV: the account's field in the bucket, the head (25 bytes).
-- Returns the head that is there now. Where nothing is verified, there is none, and none is kept.
if redis.call('EXISTS', KEYS[1]) == 0 then
    return ARGV[2]
end
local known = redis.call('HGET', KEYS[2], ARGV[1])
if known and string.sub(known, 1, 8) ~= string.rep('\0', 8) then
    return known
end
if redis.call('HSET', KEYS[2], ARGV[1], ARGV[2] .. string.sub(known or '', 26)) == 1 then
    redis.call('INCRBY', KEYS[1], 1)
end
return ARGV[2]
