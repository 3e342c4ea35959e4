//! The floor under any way of writing the same rows: two sessions COPY them into the same tables, with the same indexes.

use std::time::Instant;

use anyhow::{Context as _, Result};
use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt as _, TryStreamExt as _};

use super::postgres::Connection;

/// Sessions that copy side by side.
pub const SESSIONS: usize = 2;
/// Rows that are committed together.
const COMMIT_ROWS: usize = 10_000;
/// Bytes that are handed to the driver at a time.
const MESSAGE_BYTES: usize = 64 * 1024;

/// The rows of one table, in the form of COPY's texts.
struct Table {
    sql: String,
    /// One commit, in pieces for the driver.
    commits: Vec<Vec<Bytes>>,
    size: usize,
}

/// The events' rows, table by table.
pub struct Rows {
    tables: Vec<Table>,
    /// How many there are.
    pub count: u64,
    /// Their bytes in COPY's texts.
    pub bytes: u64,
}

/// Reads all rows from a database, except those of tables that had rows before the run, such as the migrations'
/// records.
///
/// # Errors
///
/// The server refuses.
pub async fn take_rows(url: &str, template: &str) -> Result<Rows> {
    let before = Connection::open(template).await?;
    let after = Connection::open(url).await?;
    let sql = "SELECT c.oid::regclass::text,
                      string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum)
               FROM pg_class c
               JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
               WHERE c.relkind = 'r' AND c.relnamespace IN ('public'::regnamespace, 'standpipe'::regnamespace)
               GROUP BY c.oid ORDER BY 1";
    let mut rows = Rows { tables: Vec::new(), count: 0, bytes: 0 };
    for row in after.query(sql, &[]).await? {
        let (name, columns): (String, String) = (row.get(0), row.get(1));
        let filled = before.query_one(&format!("SELECT EXISTS (SELECT FROM {name})"), &[]).await?;
        if filled.get(0) {
            continue;
        }
        let mut table =
            Table { sql: format!("COPY {name} ({columns}) FROM STDIN"), commits: Vec::new(), size: 0 };
        let mut count = 0;
        let mut piece = BytesMut::new();
        let stream = after.copy_out(&format!("COPY {name} ({columns}) TO STDOUT")).await?;
        let mut stream = std::pin::pin!(stream);
        // One message is one row.
        while let Some(line) = stream.try_next().await? {
            if count % COMMIT_ROWS == 0 {
                table.end_piece(&mut piece);
                table.commits.push(Vec::new());
            }
            count += 1;
            table.size += line.len();
            piece.extend_from_slice(&line);
            if piece.len() >= MESSAGE_BYTES {
                table.end_piece(&mut piece);
            }
        }
        table.end_piece(&mut piece);
        rows.count += count as u64;
        rows.bytes += table.size as u64;
        if count > 0 {
            rows.tables.push(table);
        }
    }
    Ok(rows)
}

impl Table {
    fn end_piece(&mut self, piece: &mut BytesMut) {
        if let Some(last) = self.commits.last_mut()
            && !piece.is_empty()
        {
            last.push(piece.split().freeze());
        }
    }
}

/// The sessions, connected.
pub struct Copying {
    sessions: Vec<Connection>,
}

impl Copying {
    /// Connects.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn open(url: &str) -> Result<Self> {
        let mut sessions = Vec::new();
        for _ in 0..SESSIONS {
            sessions.push(Connection::open(url).await?);
        }
        Ok(Self { sessions })
    }

    /// Copies the rows; returns the seconds that it took.
    ///
    /// # Errors
    ///
    /// The server refuses.
    pub async fn copy(&self, rows: &Rows) -> Result<f64> {
        let shares = share(&rows.tables);
        let began = Instant::now();
        let work = self.sessions.iter().zip(shares).map(async |(session, tables)| {
            for table in tables {
                for commit in &table.commits {
                    let sink = session.copy_in(&table.sql).await?;
                    let mut sink = std::pin::pin!(sink);
                    for piece in commit {
                        sink.feed(piece.clone()).await?;
                    }
                    sink.finish().await.context("COPY")?;
                }
            }
            anyhow::Ok(())
        });
        futures_util::future::try_join_all(work).await?;
        Ok(began.elapsed().as_secs_f64())
    }
}

/// Divides the tables among the sessions: the largest first, always to the session with the least.
fn share(tables: &[Table]) -> Vec<Vec<&Table>> {
    let mut sorted: Vec<&Table> = tables.iter().collect();
    sorted.sort_by_key(|table| std::cmp::Reverse(table.size));
    let mut shares = vec![(0, Vec::new()); SESSIONS];
    for table in sorted {
        if let Some((bytes, share)) = shares.iter_mut().min_by_key(|(bytes, _)| *bytes) {
            *bytes += table.size;
            share.push(table);
        }
    }
    shares.into_iter().map(|(_, share)| share).collect()
}
