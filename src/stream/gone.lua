-- Acknowledges entries that somebody removed while they were pending, and has the reader go back for them.
--
-- KEYS: stream, relay, watch (see janitor.lua).  ARGV: group, ids.
--
-- Redis refuses HSET when its memory is full, but not in a script that has written. One by one: there may be more of them
-- than Lua can pass at a time.
local count = 0
for i = 2, #ARGV do
    count = count + redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
end
if redis.call('EXISTS', KEYS[2]) == 1 then
    redis.call('HSET', KEYS[3], 'due', 1)
end
return count
