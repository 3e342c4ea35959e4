-- The columns that we added to the application's tables.
SELECT table_name, column_name FROM standpipe.added_columns ORDER BY 1, 2
