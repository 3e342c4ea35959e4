-- The tables that were there before us.
SELECT name FROM standpipe.tables_before
