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
if not has_room(KEYS[1], KEYS[3], ARGV[1]) then
    return ''
end
if ARGV[2] ~= '' and redis.call('HGET', KEYS[5], ARGV[2]) ~= ARGV[3] then
    return ''
end
local entries = {}
for i = 6, #ARGV do
    entries[#entries + 1] = {ARGV[5], ARGV[i]}
end
local last = ''
if #entries > 0 then
    local seq = ARGV[4] ~= '' and ARGV[4] or redis.call('GET', KEYS[2]) or ''
    local ids = append(KEYS[1], KEYS[3], KEYS[4], entries, seq)
    last = ids[#ids]
end
if ARGV[2] ~= '' then
    redis.call('HDEL', KEYS[5], ARGV[2])
end
return last
