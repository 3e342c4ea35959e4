-- What was noted last of what the group acknowledged.
SELECT noted_ms, relay, epoch, position FROM standpipe.acknowledged
WHERE stream = $1 AND consumer_group = $2
