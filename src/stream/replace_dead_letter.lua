-- Removes a dead letter, or puts another in its place, and keeps the count of bytes.
--
-- KEYS: dead letters, their size in bytes.  ARGV: id, then names and values of the replacement, if any.
-- Returns 1, or 0 when it was not there: somebody else has seen to it.
local found = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not found then
    return 0
end
local change = 0
for _, text in ipairs(found[2]) do
    change = change - #text
end
if #ARGV > 1 then
    for i = 2, #ARGV do
        change = change + #ARGV[i]
    end
    redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))
end
redis.call('XDEL', KEYS[1], ARGV[1])
redis.call('INCRBY', KEYS[2], change)
return 1
