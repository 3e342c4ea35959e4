-- Takes over entries that have been idle for some time.
--
-- KEYS: stream, relay, watch (see janitor.lua).  ARGV: group, consumer, idle time in milliseconds, start, count.
-- Replies like XAUTOCLAIM. Since Redis 7, removed entries are no longer pending once XAUTOCLAIM has reported them, so
-- the same step records that the reader has to go back for them.
local answer = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5])
if answer[3] and #answer[3] > 0 and redis.call('EXISTS', KEYS[2]) == 1 then
    redis.call('HSET', KEYS[3], 'due', 1)
end
return answer
