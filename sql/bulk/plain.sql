-- Applies operations of one plain kind ($1, as standpipe.apply_plain has it), on different records. Returns the URIs of those
-- that were changed.
SELECT standpipe.apply_all_plain($1, $2)
