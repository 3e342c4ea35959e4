-- Makes sure that the stream and the group exist, and returns what was missing.
--
-- KEYS: stream, cursor, acked, lost, watch, start.  ARGV: group.  Returns {stream was lost, group was created}.
--
-- A position in `acked` shows that the stream existed before: somebody deleted it. The reader goes back to the
-- lowest unacknowledged position: its next append finds the cursor moved, and it restarts from there.
-- One script, so that only one of several processes sees the loss.
local lost = 0
if redis.call('EXISTS', KEYS[1]) == 0 then
    local acked = redis.call('GET', KEYS[3])
    if acked then
        lost = 1
        redis.call('SET', KEYS[2], acked)
        redis.call('INCR', KEYS[4])
        -- They refer to entries of the deleted stream.
        redis.call('DEL', KEYS[5], KEYS[6])
    end
end
-- From the beginning: the stream's entries may not have been read, and applying an event again is harmless.
local created = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if created.err then
    if string.find(created.err, 'BUSYGROUP', 1, true) then
        return {lost, 0}
    end
    return created
end
return {lost, 1}
