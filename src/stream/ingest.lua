-- Appends the entries of one request, unless the same request was accepted before.
--
-- KEYS: stream, watch, epoch, what the request of this name got (the stream again if it has no name), the accounts that
--       others feed, the stream of tasks, the positions of the origin (the stream again if it has none).
-- ARGV: the length at which there is no room, what tells this request from another one of the same name, for how many
--       seconds its name is remembered, the number of accounts, and each; the number of positions, and of each
--       its name, where it was ('' for nowhere), and where it is to be; then for each entry its type, its data, and
--       whether it is a task (1 or 0).
-- Returns a word and the entries' ids, a task's with a `t` in front: `new`, `known` (it was accepted before), `other` (another request had this name),
-- `moved` (a position is not where it was), `full` (there is no room) or `none` (there is no stream).
local named = KEYS[4] ~= KEYS[1]
if named then
    local known = redis.call('GET', KEYS[4])
    if known then
        local print, ids = string.match(known, '^(%S+) (.*)$')
        if print ~= ARGV[2] then
            return {'other'}
        end
        local answer = {'known'}
        for id in string.gmatch(ids, '%S+') do
            answer[#answer + 1] = id
        end
        return answer
    end
end
local positions = 6 + tonumber(ARGV[4])
local first = positions + 3 * tonumber(ARGV[positions - 1])
for i = positions, first - 1, 3 do
    if (redis.call('HGET', KEYS[7], ARGV[i]) or '') ~= ARGV[i + 1] then
        return {'moved'}
    end
end
local entries, tasks = {}, {}
for i = first, #ARGV, 3 do
    local list = ARGV[i + 2] == '1' and tasks or entries
    list[#list + 1] = {ARGV[i], ARGV[i + 1]}
end
if #entries > 0 and redis.call('EXISTS', KEYS[1]) == 0 then
    return {'none'}
end
if #entries > 0 and not has_room(KEYS[1], KEYS[2], ARGV[1]) then
    return {'full'}
end
if #tasks > 0 and redis.call('XLEN', KEYS[6]) >= tonumber(ARGV[1]) then
    return {'full'}
end
-- No number: that is the relay's alone.
local appended = append(KEYS[1], KEYS[2], KEYS[3], entries, '')
local ids, next_entry, next_task = {}, 1, 1
for i = first, #ARGV, 3 do
    if ARGV[i + 2] == '1' then
        local task = tasks[next_task]
        ids[#ids + 1] = 't' .. redis.call('XADD', KEYS[6], '*', 'type', task[1], 'data', task[2], 'seq', '')
        next_task = next_task + 1
    else
        ids[#ids + 1] = appended[next_entry]
        next_entry = next_entry + 1
    end
end
for i = 5, positions - 2 do
    redis.call('HSET', KEYS[5], ARGV[i], 1)
end
for i = positions, first - 1, 3 do
    redis.call('HSET', KEYS[7], ARGV[i], ARGV[i + 2])
end
if named then
    redis.call('SET', KEYS[4], ARGV[2] .. ' ' .. table.concat(ids, ' '), 'EX', ARGV[3])
end
table.insert(ids, 1, 'new')
return ids
