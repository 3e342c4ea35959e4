//! Looking into a database, as `psql` would.

use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

/// A connection that is driven in the background until the client is dropped.
pub async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls)
        .await
        .unwrap_or_else(|error| panic!("connecting to {url}: {error}"));
    tokio::spawn(connection);
    // Regardless of the database's defaults.
    let ours = "SET statement_timeout = 0; SET lock_timeout = 0; SET default_transaction_isolation = 'read committed';
                SET DateStyle = 'ISO'; SET TimeZone = 'UTC'; SET default_transaction_read_only = off;
                SELECT set_config('search_path', '\"$user\", public', false)
                WHERE current_setting('search_path') = 'nowhere'";
    client.batch_execute(ours).await.unwrap();
    client
}

/// The rows of the last statement of `sql`, every value as text.
pub async fn query_rows(url: &str, sql: &str) -> Vec<Vec<Option<String>>> {
    let client = connect(url).await;
    let messages = match client.simple_query(sql).await {
        Ok(messages) => messages,
        Err(error) => panic!("{sql}: {}", error.as_db_error().map_or(error.to_string(), ToString::to_string)),
    };
    let mut rows = Vec::new();
    for message in messages {
        match message {
            SimpleQueryMessage::Row(row) => {
                rows.push((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect());
            }
            // A new statement begins: earlier rows belong to another one.
            SimpleQueryMessage::RowDescription(_) => rows.clear(),
            _ => {}
        }
    }
    rows
}

/// The first value of the first row, as text.
pub async fn query_value(url: &str, sql: &str) -> String {
    let rows = query_rows(url, sql).await;
    let value = rows.first().and_then(|row| row.first()).cloned().flatten();
    value.unwrap_or_else(|| panic!("{sql}: no value"))
}

/// Runs statements and ignores their rows.
pub async fn execute(url: &str, sql: &str) {
    query_rows(url, sql).await;
}

/// The given columns (an SQL list) of all rows of a table, sorted, so that two tables with the same content
/// compare equal.
pub async fn table_dump(url: &str, table: &str, columns: &str) -> Vec<Vec<Option<String>>> {
    let mut rows = query_rows(url, &format!("SELECT {columns} FROM {table}")).await;
    rows.sort();
    rows
}
