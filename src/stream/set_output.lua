-- What scripts have in common that move outputs. It stands before each of them.

-- The stream's groups, each as a table.
local function groups_of(stream)
    local all = {}
    for _, list in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
        local group = {}
        for i = 1, #list, 2 do
            group[list[i]] = list[i + 1]
        end
        all[#all + 1] = group
    end
    return all
end

-- Advances a group by this many entries, to this id. Redis 7 also counts the entries that a group has read.
local function set_output(stream, group, id, entries)
    local lag = group['lag']
    if lag then
        local info, added = redis.call('XINFO', 'STREAM', stream), nil
        for i = 1, #info, 2 do
            if info[i] == 'entries-added' then
                added = info[i + 1]
            end
        end
        redis.call('XGROUP', 'SETID', stream, group['name'], id, 'ENTRIESREAD', added - lag + entries)
    else
        redis.call('XGROUP', 'SETID', stream, group['name'], id)
    end
end

