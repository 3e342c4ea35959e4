-- Removes or replaces a dead letter, and updates the byte count.
--
-- KEYS: dead letters, their size in bytes, their keys, their accounts (see append.lua).  ARGV: id, then names and values of
-- the replacement, if any.
-- Returns 1, or 0 if it did not exist, because another process has handled it.
local found = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not found then
    return 0
end
local change, fields = 0, {}
for i, text in ipairs(found[2]) do
    change = change - #text
    if i % 2 == 1 then
        fields[text] = found[2][i + 1]
    end
end
local new = nil
if #ARGV > 1 then
    for i = 2, #ARGV do
        change = change + #ARGV[i]
    end
    new = redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))
end
redis.call('XDEL', KEYS[1], ARGV[1])
redis.call('INCRBY', KEYS[2], change)
if fields['key'] and fields['account'] then
    if new then
        redis.call('HSET', KEYS[3], fields['key'], new)
    else
        redis.call('HDEL', KEYS[3], fields['key'])
        if redis.call('HINCRBY', KEYS[4], fields['account'], -1) <= 0 then
            redis.call('HDEL', KEYS[4], fields['account'])
        end
    end
end
return 1
