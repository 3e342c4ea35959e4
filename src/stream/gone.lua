-- Acknowledges entries that somebody removed while they were pending, and has the reader go back for them.
--
-- KEYS: stream, relay, watch (see janitor.lua).  ARGV: group, ids.
if redis.call('EXISTS', KEYS[2]) == 1 then
    -- Refused when memory is full; then they stay pending and are found again.
    redis.call('HSET', KEYS[3], 'due', 1)
end
return redis.call('XACK', KEYS[1], unpack(ARGV))
