-- The state a reader needs before it starts.
--
-- KEYS: stream, cursor, relay, acked, epoch, epochs (see append.lua for both).
-- Returns {cursor, relay, acked, epoch, the earliest time at which a new one can begin, in milliseconds, the highest cursor of
-- the epoch, the generation of heads, the last lossy one}; '' for none.
--
-- If another program's reader has appended since ours did, records from which entry on: its entries name no epoch and
-- have no revisions, and are placed after everything that ours had appended (src/event/epoch.rs).
local last = '0-0'
if redis.call('EXISTS', KEYS[1]) == 1 then
    local info = redis.call('XINFO', 'STREAM', KEYS[1])
    for i = 1, #info, 2 do
        if info[i] == 'last-generated-id' then
            last = info[i + 1]
        end
    end
end
local function parts(id)
    local ms, seq = string.match(id, '^(%d+)-(%d+)$')
    return tonumber(ms), tonumber(seq)
end
local ms, seq = parts(last)
local ours = redis.call('HGET', KEYS[5], 'last')
if ours then
    local our_ms, our_seq = parts(ours)
    if our_ms < ms or (our_ms == ms and our_seq < seq) then
        redis.call('RPUSH', KEYS[6], string.format('%d-%d %s %s', our_ms, our_seq + 1,
            redis.call('HGET', KEYS[5], 'id'), redis.call('HGET', KEYS[5], 'rev') or ''))
        redis.call('LTRIM', KEYS[6], -1000, -1)
        redis.call('HSET', KEYS[5], 'last', last)
    end
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- If the clock was set back, ids continue from the last one.
return {redis.call('GET', KEYS[2]) or '', redis.call('GET', KEYS[3]) or '', redis.call('GET', KEYS[4]) or '',
        redis.call('HGET', KEYS[5], 'id') or '', string.format('%d', math.max(now, ms + 1)),
        redis.call('HGET', KEYS[5], 'high') or '', redis.call('HGET', KEYS[5], 'generation') or '0',
        redis.call('HGET', KEYS[5], 'lossy') or '0'}
