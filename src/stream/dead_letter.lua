-- Acknowledges an entry and keeps its rejected operations as dead letters, atomically.
--
-- KEYS: stream, dead letters, their size in bytes, a hash of what was refused by entry.
-- ARGV: group, entry id, budget in bytes, the paths of the refused operations as JSON, the most entries in the hash
--       (0: it is a task, and removed), then for each dead letter the number of its names and values, and these.
-- Returns 1 if done, 0 if somebody else had already acknowledged the entry, -1 if the budget is full: then the entry
-- stays pending.
local size = 0
local at = 6
while at <= #ARGV do
    local count = tonumber(ARGV[at])
    for i = at + 1, at + count do
        size = size + #ARGV[i]
    end
    at = at + count + 1
end
if tonumber(redis.call('GET', KEYS[3]) or '0') + size > tonumber(ARGV[3]) then
    return -1
end
-- If memory is full, this is refused before the entry is acknowledged.
redis.call('INCRBY', KEYS[3], 0)
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then
    return 0
end
at = 6
while at <= #ARGV do
    local count = tonumber(ARGV[at])
    redis.call('XADD', KEYS[2], '*', unpack(ARGV, at + 1, at + count))
    at = at + count + 1
end
redis.call('INCRBY', KEYS[3], size)
if ARGV[5] == '0' then
    redis.call('XDEL', KEYS[1], ARGV[2])
elseif redis.call('HLEN', KEYS[4]) < tonumber(ARGV[5]) then
    redis.call('HSET', KEYS[4], ARGV[2], ARGV[4])
end
return 1
