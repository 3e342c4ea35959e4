-- The epochs that sequence numbers belong to: the times, in Redis's milliseconds, at which an origin's numbering began as far
-- as is known. An entry that names none belongs to the one in force at its id (standpipe.placed).
CREATE TABLE IF NOT EXISTS standpipe.epochs (
    epoch bigint PRIMARY KEY
);

-- What of each stream a group had acknowledged when that was last noted, by Redis's clock (noted_ms): everything up to
-- this position of the relay is in these tables. A database that knows less than Redis says it noted has gone back in time,
-- or is another one.
CREATE TABLE IF NOT EXISTS standpipe.acknowledged (
    stream text NOT NULL,
    consumer_group text NOT NULL,
    noted_ms bigint NOT NULL,
    -- the relay's host; NULL where another program's reader fed the stream
    relay text,
    epoch bigint NOT NULL,
    -- NULL before the first acknowledgement
    position bigint,
    PRIMARY KEY (stream, consumer_group)
);
