-- The newest revision among an account's tombstones that were deleted because of their age: of anything older, nobody knows
-- any more whether it was deleted.
CREATE TABLE IF NOT EXISTS standpipe.swept (
    did text COLLATE "C" PRIMARY KEY,
    rev text COLLATE "C" NOT NULL
);
