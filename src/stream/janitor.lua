-- Trims entries that every group has acknowledged, records the position before the lowest that our group has not,
-- detects entries that somebody else removed before then, and reports.
--
-- KEYS: stream, cursor, acked, start, relay, watch, trimmed.
-- ARGV: our group, the maximum number of entries to trim (0 to look and change nothing), Unix milliseconds, how long to
--       wait before setting the reader back again, in milliseconds; for how many milliseconds entries are kept after they were
--       acknowledged, '' if this process keeps none; the bytes that are enough, or ''; how long an entry may
--       wait for an output, in milliseconds, '' for no limit.
-- Returns {length, own group exists, pending, lag or -1, oldest pending id, oldest undelivered id, trimmed,
--          the group that holds the trim back, entries found removed, reader set back,
--          entries before the first that some group has not acknowledged, entries that outputs skipped}, or {} without a
--          stream.
--
-- One script, because reading pending entries before the groups, with a delivery in between, once deleted pending
-- entries. Never trims while our own group is missing: then nothing is known to be acknowledged.
--
-- The hash `watch` holds the state kept between calls (append.lua begins it): `unacked`, the first entry that was not
-- acknowledged, and `last`, the last of the stream; `added` and `removed`, how many entries there had ever been and how many of
-- them were gone and not trimmed here; `appended`, how many append.lua appended (Redis 6.2 does not count them itself), and
-- `seen`, how many at that call; `due`, the reader has to be set back; `back_ms`, when that was done last, `back_to`, to which
-- position, and `pause`, for how long not again; `hold`, the last entry of the stream then: what the reader appends after that
-- has lower numbers than what stands before it, so that `acked` stays where it is until the group is beyond; `acknowledged`,
-- how many entries stand before the first that some group has not acknowledged, and `delivered`, `<id> <number>`, how many
-- stood there up to an entry that every group had received, with those trimmed until then; `keeper`, when a process last kept
-- any of them, and `marks`, up to where it was when. `trimmed` is how many entries were trimmed here, by every process of ours,
-- also by one that has other keys than this.
if redis.call('EXISTS', KEYS[1]) == 0 then
    return {}
end
local dry = ARGV[2] == '0'
if not dry then
    -- Redis refuses HSET and SET when its memory is full, but not in a script that has written: this changes nothing.
    redis.call('HDEL', KEYS[6], '')
end

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

local function stream()
    local info = map(redis.call('XINFO', 'STREAM', KEYS[1]))
    info['added'] = info['entries-added'] or tonumber(redis.call('HGET', KEYS[6], 'appended'))
    if info['added'] then
        info['removed'] = info['added'] - info['length'] - (tonumber(redis.call('GET', KEYS[7])) or 0)
    end
    return info
end

-- Acknowledges pending entries that no longer exist, starting with the first, and returns their number.
local function forget_pending(group)
    if group['pending'] == 0 or exists(redis.call('XPENDING', KEYS[1], group['name'])[2]) then
        return 0
    end
    local gone = {}
    for _, entry in ipairs(redis.call('XPENDING', KEYS[1], group['name'], '-', '+', 1000)) do
        if exists(entry[1]) then
            break
        end
        gone[#gone + 1] = entry[1]
    end
    return #gone > 0 and redis.call('XACK', KEYS[1], group['name'], unpack(gone)) or 0
end

-- How many entries somebody else removed since the last call that may not have been acknowledged: all that are gone, unless
-- every one of them stood before the first that was not acknowledged then. Not by the group's `lag`: what is trimmed before
-- its delivery counts there as read, always after 7.2.6 and before it where the group had read nothing.
local function removed()
    local unacked = redis.call('HGET', KEYS[6], 'unacked')
    local info = stream()
    local was_added = tonumber(redis.call('HGET', KEYS[6], 'added'))
    local was_removed = tonumber(redis.call('HGET', KEYS[6], 'removed'))
    if not was_added or not was_removed then
        return 0
    end
    local added, length, deleted = info['added'], info['length'], info['max-deleted-entry-id'] or '0-0'
    local appended, seen = redis.call('HGET', KEYS[6], 'appended'), redis.call('HGET', KEYS[6], 'seen')
    if added < was_added or (appended and seen and added - was_added < appended - seen) then
        -- This is a different stream.
        return 1
    end
    local gone = info['removed'] - was_removed
    if gone <= 0 then
        return 0
    end
    -- XTRIM takes from the front: where this one is there, or all that came since, nothing behind it was trimmed.
    local there, deleted_before
    if unacked then
        there, deleted_before = exists(unacked), before(deleted, unacked)
    else
        there, deleted_before = length >= added - was_added, not before(redis.call('HGET', KEYS[6], 'last'), deleted)
    end
    return there and deleted_before and 0 or gone
end

local function look(group)
    local first, pending = '', group['pending']
    if pending > 0 then
        first = redis.call('XPENDING', KEYS[1], group['name'])[2]
    end
    local waiting = redis.call('XRANGE', KEYS[1], '(' .. group['last-delivered-id'], '+', 'COUNT', 1)[1]
    return first, waiting
end

-- Records the position before the lowest unacknowledged one.
local function note(first, waiting)
    local unacked = waiting
    if first ~= '' then
        unacked = redis.call('XRANGE', KEYS[1], first, '+', 'COUNT', 1)[1] or waiting
    end
    local was, last = redis.call('HGET', KEYS[6], 'unacked'), redis.call('HGET', KEYS[6], 'last')
    if unacked and last and (was and before(unacked[1], was) or not was and not before(last, unacked[1])) then
        -- The group starts over, and the entries in the stream may not be in the order of their numbers.
        redis.call('HSET', KEYS[6], 'hold', stream()['last-generated-id'])
    end
    if unacked then
        redis.call('HSET', KEYS[6], 'unacked', unacked[1])
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
    if redis.call('HEXISTS', KEYS[6], 'due') == 1 or (hold and unacked and not before(hold, unacked[1])) then
        return
    end
    local position = redis.call('GET', KEYS[2])
    if unacked then
        -- Some relays start after the cursor, others at it.
        local seq = tonumber(map(unacked[2])['seq'])
        position = seq and string.format('%d', seq - 1)
    end
    if position then
        redis.call('SET', KEYS[3], position)
    end
    redis.call('HDEL', KEYS[6], 'hold')
end

-- Sets the reader back to the lowest unacknowledged position: its next append finds the cursor moved, and it resumes
-- from there. Limited in frequency, in case entries keep being removed.
local function set_back()
    local cursor, acked = redis.call('GET', KEYS[2]), redis.call('GET', KEYS[3])
    local last = tonumber(redis.call('HGET', KEYS[6], 'back_ms') or '0')
    local since, pause = tonumber(ARGV[3]) - last, tonumber(redis.call('HGET', KEYS[6], 'pause') or ARGV[4])
    -- Another process's clock may be ahead of ours.
    if not cursor or not acked or (since >= 0 and since < pause) then
        return 0
    end
    -- Back to the same position, because entries keep being removed: the pause grows each time, or the reader would
    -- never get past it.
    pause = redis.call('HGET', KEYS[6], 'back_to') == acked and pause * 2 or ARGV[4]
    redis.call('HSET', KEYS[6], 'pause', pause, 'back_to', acked)
    redis.call('HSET', KEYS[6], 'hold', stream()['last-generated-id'], 'back_ms', ARGV[3])
    redis.call('SET', KEYS[2], acked)
    redis.call('HDEL', KEYS[6], 'due')
    return 1
end

-- Advances outputs that are further behind than ARGV[7], a thousand entries at a time, but not beyond what our own group has
-- acknowledged. Returns how many entries they skip.
local function skip_for_outputs(groups)
    local settled, skipped = '0-0', 0
    for _, group in ipairs(groups) do
        if group['name'] == ARGV[1] then
            settled = group['last-delivered-id']
            if group['pending'] > 0 then
                settled = '(' .. redis.call('XPENDING', KEYS[1], ARGV[1])[2]
            end
        end
    end
    local time = redis.call('TIME')
    local oldest = string.format('%d-0', math.max(0, time[1] * 1000 + math.floor(time[2] / 1000) - ARGV[7]))
    local until_ = before(oldest, (string.gsub(settled, '%(', ''))) and oldest or settled
    for _, group in ipairs(groups) do
        local at = group['last-delivered-id']
        if string.sub(group['name'], 1, 4) == 'out:' and before(at, (string.gsub(until_, '%(', ''))) then
            local late = redis.call('XRANGE', KEYS[1], '(' .. at, until_, 'COUNT', 1000)
            if #late > 0 then
                set_output(KEYS[1], group, late[#late][1], #late)
                skipped = skipped + #late
            end
        end
    end
    return skipped
end

local own, floor, holder = false, nil, ''
-- Up to which entry every group has received all, and how many those are, if that is known.
local received, number, known, floor_is_done = nil, redis.call('XLEN', KEYS[1]), true, false
local pending, lag, oldest_pending, oldest_waiting = 0, -1, '', ''
local gone, back = 0, 0
if not dry then
    for _, group in ipairs(groups_of(KEYS[1])) do
        if group['name'] == ARGV[1] then
            gone = math.max(removed(), forget_pending(group))
            -- Entries appended by another program's reader cannot be re-read.
            if redis.call('EXISTS', KEYS[5]) == 1 then
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
local skipped = 0
if not dry and ARGV[7] ~= '' then
    skipped = skip_for_outputs(groups_of(KEYS[1]))
end
for _, group in ipairs(groups_of(KEYS[1])) do
    local first, waiting = look(group)
    local low = group['last-delivered-id']
    if first ~= '' and before(first, low) then
        low = first
    end
    if floor == nil or before(low, floor) then
        -- The last one delivered is done unless it is pending.
        floor, holder, floor_is_done = low, group['name'], low ~= first
    end
    if received == nil or before(group['last-delivered-id'], received) then
        received = group['last-delivered-id']
        local behind = not waiting and 0 or group['lag']
        if not behind then
            -- Redis 6.2 does not count them.
            local some = #redis.call('XRANGE', KEYS[1], '(' .. received, '+', 'COUNT', 1001)
            behind = some <= 1000 and some or nil
        end
        known = behind ~= nil
        number = redis.call('XLEN', KEYS[1]) - (behind or 0)
    end
    if group['name'] == ARGV[1] then
        own = true
        pending, oldest_pending = group['pending'], first
        if waiting then
            oldest_waiting = waiting[1]
        end
        if group['lag'] then
            -- Entries trimmed before their delivery may stay counted in it forever.
            lag = waiting and group['lag'] or 0
            if lag ~= group['lag'] and not dry then
                redis.call('XGROUP', 'SETID', KEYS[1], ARGV[1], group['last-delivered-id'], 'ENTRIESREAD',
                    stream()['entries-added'])
            end
        end
        if not dry then
            note(first, waiting)
        end
    end
end

-- Up to where entries are older than ARGV[5] since they were acknowledged, by the marks noted from time to time: `<ms>:<id>`, oldest
-- first, the first one being at least so old. The last entry that is acknowledged always stays, so that subscribers can tell that
-- nothing behind it is gone.
local function aged(now, mark)
    local marks, age = {}, tonumber(ARGV[5])
    for time, id in string.gmatch(redis.call('HGET', KEYS[6], 'marks') or '', '(%d+):(%S+)') do
        -- The clock may have been set back.
        if tonumber(time) <= now then
            marks[#marks + 1] = {tonumber(time), id}
        end
    end
    if #marks == 0 or now - marks[#marks][1] >= age / 10 then
        marks[#marks + 1] = {now, mark}
    end
    while #marks > 1 and now - marks[2][1] >= age do
        table.remove(marks, 1)
    end
    local texts = {}
    for i, one in ipairs(marks) do
        texts[i] = string.format('%d:%s', one[1], one[2])
    end
    redis.call('HSET', KEYS[6], 'marks', table.concat(texts, ' '))
    if now - marks[1][1] < age then
        return '0-0'
    end
    return before(marks[1][2], mark) and marks[1][2] or mark
end

-- How many entries stand before the floor, at least. Those behind it that are acknowledged do not count: they cannot be trimmed.
-- Redis counts only what was received, so the answer is exact when nothing is pending, and otherwise what had been received at an
-- earlier call.
local function acknowledged_now()
    local count = tonumber(redis.call('HGET', KEYS[6], 'acknowledged') or '0')
    local past = tonumber(redis.call('GET', KEYS[7]) or '0')
    local id, total = string.match(redis.call('HGET', KEYS[6], 'delivered') or '', '^(%S+) (%d+)$')
    if known and received == floor and floor_is_done then
        count, id = number, nil
    elseif id and (before(id, floor) or id == floor and floor_is_done) then
        count, id = total - past, nil
    end
    if not id and known then
        redis.call('HSET', KEYS[6], 'delivered', string.format('%s %d', received, number + past))
    end
    -- Somebody else may have trimmed.
    return math.max(0, math.min(count, number))
end

-- How many acknowledged entries are too many for ARGV[6], by the size of those at both ends and in the middle of their time.
local function surplus(acknowledged)
    local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
    local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
    if not first then
        return 0
    end
    local middle = string.format('%d-0', math.floor((parts(first[1]) + parts(last[1])) / 2))
    local bytes, seen = 0, 0
    for _, page in ipairs({
        redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 50),
        redis.call('XRANGE', KEYS[1], middle, '+', 'COUNT', 50),
        redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 50),
    }) do
        for _, entry in ipairs(page) do
            for _, text in ipairs(entry[2]) do
                bytes = bytes + #text
            end
            seen = seen + 1
        end
    end
    -- What Redis needs for an entry besides: measured as a fifth, its nodes being as long as an allocator's sizes.
    local each = (bytes / seen + 20) * 1.2
    return math.max(0, math.ceil(acknowledged - ARGV[6] / each))
end

local trimmed, acknowledged = 0, tonumber(redis.call('HGET', KEYS[6], 'acknowledged') or '0')
if own and not dry then
    acknowledged = acknowledged_now()
    local limit, bound = tonumber(ARGV[2]), floor
    local time = redis.call('TIME')
    local keeper = tonumber(redis.call('HGET', KEYS[6], 'keeper') or '0')
    if ARGV[5] ~= '' then
        local last = redis.call('XREVRANGE', KEYS[1], floor, '-', 'COUNT', 2)
        -- The floor itself may be pending.
        local mark = last[1] and (last[1][1] ~= floor or floor_is_done) and last[1][1] or last[2] and last[2][1] or '0-0'
        bound = aged(time[1] * 1000 + math.floor(time[2] / 1000), mark)
        if ARGV[6] ~= '' then
            limit = math.min(limit, surplus(acknowledged))
        end
        redis.call('HSET', KEYS[6], 'keeper', time[1])
    elseif keeper <= tonumber(time[1]) and time[1] - keeper < 3600 then
        -- Another process keeps entries, and trims, or will when it is back.
        limit = 0
    else
        redis.call('HDEL', KEYS[6], 'keeper', 'marks')
    end
    if limit > 0 then
        trimmed = redis.call('XTRIM', KEYS[1], 'MINID', '~', bound, 'LIMIT', string.format('%d', limit))
        redis.call('INCRBY', KEYS[7], trimmed)
    end
    acknowledged = math.max(0, acknowledged - trimmed)
    redis.call('HSET', KEYS[6], 'acknowledged', acknowledged)
    local info = stream()
    redis.call('HSET', KEYS[6], 'last', info['last-generated-id'])
    if info['added'] then
        redis.call('HSET', KEYS[6], 'added', info['added'], 'removed', info['removed'],
            'seen', redis.call('HGET', KEYS[6], 'appended') or 0)
    end
end
return {redis.call('XLEN', KEYS[1]), own and 1 or 0, pending, lag, oldest_pending, oldest_waiting, trimmed, holder,
        gone, back, acknowledged, skipped}
