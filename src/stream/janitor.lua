-- Trims what every group has acknowledged, notes the lowest position that our group has not, finds what somebody else
-- removed before that, and reports.
--
-- KEYS: stream, cursor, acked, start, relay, watch.
-- ARGV: our group, how many entries to trim at the most (0 to look and change nothing), Unix milliseconds, how long to
--       wait between two times of setting the reader back, in milliseconds.
-- Returns {length, own group exists, pending, lag or -1, oldest pending id, oldest undelivered id, trimmed,
--          the group that holds the trim back, entries found removed, reader set back}, or {} without a stream.
--
-- One script: reading pending entries before the groups, with a delivery in between, once deleted entries that
-- were pending. Never trims while our own group is missing: then nothing is known to be acknowledged.
--
-- The hash `watch` holds what one call tells the next: `unacked`, the first entry that was not acknowledged; `removed`, how
-- many of all entries that there ever were are gone; `due`, the
-- reader has to be set back; `back_ms`, when that was done last; `hold`, the last entry of the stream then. What the reader
-- appends after that has lower numbers than what stands before it, so that `acked` stays where it is until the group is
-- beyond.
if redis.call('EXISTS', KEYS[1]) == 0 then
    return {}
end
local dry = ARGV[2] == '0'
local COUNTED = 2000

local function parts(id)
    local ms, seq = string.match(id, '^(%d+)-(%d+)$')
    return tonumber(ms), tonumber(seq)
end
local function before(a, b)
    local a_ms, a_seq = parts(a)
    local b_ms, b_seq = parts(b)
    return a_ms < b_ms or (a_ms == b_ms and a_seq < b_seq)
end
local function exists(id)
    return #redis.call('XRANGE', KEYS[1], id, id) > 0
end
local function map(list)
    local fields = {}
    for i = 1, #list, 2 do
        fields[list[i]] = list[i + 1]
    end
    return fields
end

-- Writes, and says whether Redis let it: not when its memory is full.
local function write(...)
    local answer = redis.pcall(...)
    return type(answer) ~= 'table' or not answer.err
end

-- Whether entries may be missing among so many that they are not counted; `acked` stays where it is then.
local unsure = false

-- How many entries there are behind the last that was delivered. Nothing where it would hold up the server to count.
local function undelivered(delivered, length)
    local count = #redis.call('XRANGE', KEYS[1], '-', delivered, 'COUNT', COUNTED)
    if count < COUNTED then
        return length - count
    end
    count = #redis.call('XRANGE', KEYS[1], '(' .. delivered, '+', 'COUNT', COUNTED)
    return count < COUNTED and count or nil
end

-- How many entries of the group somebody removed before they were acknowledged; those that are pending no longer are.
local function removed(group)
    local count = 0
    if group['pending'] > 0 and not exists(redis.call('XPENDING', KEYS[1], group['name'])[2]) then
        local gone = {}
        for _, entry in ipairs(redis.call('XPENDING', KEYS[1], group['name'], '-', '+', 1000)) do
            if exists(entry[1]) then
                break
            end
            gone[#gone + 1] = entry[1]
        end
        if #gone > 0 then
            count = redis.call('XACK', KEYS[1], group['name'], unpack(gone))
        end
    end
    local delivered = group['last-delivered-id']
    local info = map(redis.call('XINFO', 'STREAM', KEYS[1]))
    local added, lag = info['entries-added'], group['lag']
    local missing = 0
    if added and lag and tostring(added - info['length']) ~= redis.call('HGET', KEYS[6], 'removed') then
        -- Somebody else removed entries since the last call (Redis 7 counts). What was not delivered is still in the lag.
        local waiting = undelivered(delivered, info['length'])
        unsure = not waiting
        if waiting and lag > waiting then
            missing = lag - waiting
            redis.call('XGROUP', 'SETID', KEYS[1], group['name'], delivered, 'ENTRIESREAD', added - waiting)
        end
    end
    if missing == 0 then
        local unacked = redis.call('HGET', KEYS[6], 'unacked')
        if unacked and before(delivered, unacked) and not exists(unacked) then
            missing = 1
        end
    end
    return count + missing
end

local function look(group)
    local first, pending = '', group['pending']
    if pending > 0 then
        first = redis.call('XPENDING', KEYS[1], group['name'])[2]
    end
    local waiting = redis.call('XRANGE', KEYS[1], '(' .. group['last-delivered-id'], '+', 'COUNT', 1)[1]
    return first, waiting
end

-- Notes the lowest position that is not acknowledged. When memory is full the old one stays, which is lower.
local function note(first, waiting)
    local unacked = waiting
    if first ~= '' then
        unacked = redis.call('XRANGE', KEYS[1], first, '+', 'COUNT', 1)[1] or waiting
    end
    if unacked then
        write('HSET', KEYS[6], 'unacked', unacked[1])
    else
        redis.call('HDEL', KEYS[6], 'unacked')
    end
    -- Entries from before a change of relay have another relay's numbers; of the present one nothing is
    -- acknowledged while they are not.
    local start = redis.call('GET', KEYS[4])
    if unacked and start and before(unacked[1], start) then
        unacked = redis.call('XRANGE', KEYS[1], start, '+', 'COUNT', 1)[1]
    end
    local hold = redis.call('HGET', KEYS[6], 'hold')
    if unsure or redis.call('HEXISTS', KEYS[6], 'due') == 1 or (hold and unacked and not before(hold, unacked[1])) then
        return
    end
    local position = redis.call('GET', KEYS[2])
    if unacked then
        position = map(unacked[2])['seq']
    end
    if position and position ~= '' then
        write('SET', KEYS[3], position)
    end
    redis.call('HDEL', KEYS[6], 'hold')
end

-- Sets the reader back to what is not acknowledged: its next append finds the cursor moved, and it reads again from
-- there. Not again and again, should somebody go on removing.
local function set_back()
    local cursor, acked = redis.call('GET', KEYS[2]), redis.call('GET', KEYS[3])
    local last = tonumber(redis.call('HGET', KEYS[6], 'back_ms') or '0')
    if not cursor or not acked or tonumber(ARGV[3]) - last < tonumber(ARGV[4]) then
        return 0
    end
    local info = map(redis.call('XINFO', 'STREAM', KEYS[1]))
    if not write('HSET', KEYS[6], 'hold', info['last-generated-id'], 'back_ms', ARGV[3]) then
        return 0
    end
    redis.call('SET', KEYS[2], acked)
    redis.call('HDEL', KEYS[6], 'due')
    return 1
end

local own, floor, holder = false, nil, ''
local pending, lag, oldest_pending, oldest_waiting = 0, -1, '', ''
local gone, back = 0, 0
local function groups()
    local all = {}
    for _, info in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
        all[#all + 1] = map(info)
    end
    return all
end
if not dry then
    for _, group in ipairs(groups()) do
        if group['name'] == ARGV[1] then
            -- The first write is one that Redis refuses when its memory is full: then the next call finds the same.
            if redis.call('EXISTS', KEYS[5]) == 0 then
                gone = removed(group)
            elseif write('HSET', KEYS[6], 'looked_ms', ARGV[3]) then
                gone = removed(group)
                if gone > 0 then
                    redis.call('HSET', KEYS[6], 'due', 1)
                end
                if redis.call('HEXISTS', KEYS[6], 'due') == 1 then
                    back = set_back()
                end
            end
        end
    end
end
for _, group in ipairs(groups()) do
    local first, waiting = look(group)
    local low = group['last-delivered-id']
    if first ~= '' and before(first, low) then
        low = first
    end
    if floor == nil or before(low, floor) then
        floor, holder = low, group['name']
    end
    if group['name'] == ARGV[1] then
        own = true
        pending, oldest_pending = group['pending'], first
        if group['lag'] then
            lag = group['lag']
        end
        if waiting then
            oldest_waiting = waiting[1]
        end
        if not dry then
            note(first, waiting)
        end
    end
end

local trimmed = 0
if own and not dry then
    trimmed = redis.call('XTRIM', KEYS[1], 'MINID', '~', floor, 'LIMIT', ARGV[2])
    local info = map(redis.call('XINFO', 'STREAM', KEYS[1]))
    if info['entries-added'] and not unsure then
        write('HSET', KEYS[6], 'removed', info['entries-added'] - info['length'])
    end
end
return {redis.call('XLEN', KEYS[1]), own and 1 or 0, pending, lag, oldest_pending, oldest_waiting, trimmed, holder,
        gone, back}
