-- Appends entries that come from no relay: those of a repair, and what a lookup found.
--
-- KEYS: stream, cursor, watch, epoch, a hash of what is to be done.
-- ARGV: the length at which there is no room; a field of the hash and the value that it must have, '' for none: it is done
--       then, and removed; the number of the entries, '' for the reader's last; their type; then the data of each.
-- Returns the last entry's id; '' if none was appended, because there are none, no room, no stream, or something else to
-- be done by now.
--
-- Mostly, their number is that of the last event that the reader appended: a reader that is set back to it reads everything
-- after it again.
if redis.call('EXISTS', KEYS[1]) == 0 then
    return ''
end
local kept = tonumber(redis.call('HGET', KEYS[3], 'kept') or '0')
if redis.call('XLEN', KEYS[1]) - kept >= tonumber(ARGV[1]) then
    return ''
end
if ARGV[2] ~= '' then
    if redis.call('HGET', KEYS[5], ARGV[2]) ~= ARGV[3] then
        return ''
    end
end
if #ARGV == 5 then
    redis.call('HDEL', KEYS[5], ARGV[2])
    return ''
end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
local before
for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then
        before = info[i + 1]
    end
end
local seq = ARGV[4]
if seq == '' then
    seq = redis.call('GET', KEYS[2]) or ''
end
local last
for i = 6, #ARGV do
    last = redis.call('XADD', KEYS[1], '*', 'type', ARGV[5], 'data', ARGV[i], 'seq', seq)
end
-- After the first write, which Redis refuses when its memory is full.
if ARGV[2] ~= '' then
    redis.call('HDEL', KEYS[5], ARGV[2])
end
-- They are ours, not another program's: see open.lua and janitor.lua.
if redis.call('HGET', KEYS[4], 'last') == before then
    redis.call('HSET', KEYS[4], 'last', last)
end
if redis.call('HEXISTS', KEYS[3], 'appended') == 1 then
    redis.call('HINCRBY', KEYS[3], 'appended', #ARGV - 5)
end
return last
