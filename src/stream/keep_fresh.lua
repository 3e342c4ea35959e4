-- Resets the idle time of entries in hand without counting a delivery.
--
-- KEYS: stream.  ARGV: group, consumer, ids.
-- An entry that somebody removed is left alone: XCLAIM would make it pending no longer (since Redis 7), and nobody
-- would find out that it has to be read again should this process die.
for i = 3, #ARGV do
    if #redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i]) > 0 then
        redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    end
end
