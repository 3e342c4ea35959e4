-- Appends the entries of a repair: what an account's repository has and the tables lack, and the reverse.
--
-- KEYS: stream, cursor, watch, epoch.
-- ARGV: the length at which there is no room, then the data of each entry.
-- Returns the last entry's id, or '' if there is no room or no stream: then none was appended.
--
-- They carry the number of the last event that the reader appended: whoever goes back to the position of one of them reads
-- everything after it again.
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then
    return ''
end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
local before
for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then
        before = info[i + 1]
    end
end
local seq = redis.call('GET', KEYS[2]) or ''
local last
for i = 2, #ARGV do
    last = redis.call('XADD', KEYS[1], '*', 'type', 'commit', 'data', ARGV[i], 'seq', seq)
end
-- They are ours, not another program's: see open.lua and janitor.lua.
if redis.call('HGET', KEYS[4], 'last') == before then
    redis.call('HSET', KEYS[4], 'last', last)
end
if redis.call('HEXISTS', KEYS[3], 'appended') == 1 then
    redis.call('HINCRBY', KEYS[3], 'appended', #ARGV - 1)
end
return last
