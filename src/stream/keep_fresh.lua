-- Resets the idle time of entries in hand without counting a delivery.
--
-- KEYS: stream.  ARGV: group, consumer, ids.
-- A removed entry is left alone: since Redis 7, XCLAIM would drop it from the pending list, and if this process died,
-- nobody would find out that it has to be re-read.
for i = 3, #ARGV do
    if #redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i]) > 0 then
        redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    end
end
