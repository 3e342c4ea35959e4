-- What scripts have in common that append entries of our own, which come from no relay. It stands before each of them.

-- Whether the stream is there, and has fewer entries than this that cannot be trimmed yet.
local function has_room(stream, watch, most)
    local acknowledged = tonumber(redis.call('HGET', watch, 'acknowledged') or '0')
    return redis.call('EXISTS', stream) == 1 and redis.call('XLEN', stream) - acknowledged < tonumber(most)
end

-- Appends entries, each a type and its data, and returns their ids. They are ours, not another program's: see open.lua and
-- janitor.lua. Its first write is one that Redis refuses when its memory is full.
local function append(stream, watch, epoch, entries, seq)
    if #entries == 0 then
        return {}
    end
    local info, before = redis.call('XINFO', 'STREAM', stream), nil
    for i = 1, #info, 2 do
        if info[i] == 'last-generated-id' then
            before = info[i + 1]
        end
    end
    local ids = {}
    for i, entry in ipairs(entries) do
        ids[i] = redis.call('XADD', stream, '*', 'type', entry[1], 'data', entry[2], 'seq', seq)
    end
    if redis.call('HGET', epoch, 'last') == before then
        redis.call('HSET', epoch, 'last', ids[#ids])
    end
    if redis.call('HEXISTS', watch, 'appended') == 1 then
        redis.call('HINCRBY', watch, 'appended', #ids)
    end
    return ids
end

