//! What the integration tests share: real servers, the real binary, a proxy that breaks
//! connections, and ways to wait for a condition instead of sleeping.

#![allow(dead_code, unused_imports, reason = "every test binary uses its own part of this module")]

pub mod browser;
pub mod chain;
pub mod gate;
mod http;
pub mod model;
pub mod old_database;
pub mod old_worker;
pub mod pooler;
mod program;
mod proxy;
pub mod scripted;
mod servers;
mod sql;
pub mod traffic;
mod wait;

pub use http::http_get;
pub use program::{Finished, Standpipe};
pub use proxy::TcpProxy;
pub use servers::{HOSTILE_DEFAULTS, Postgres, Redis};
pub use sql::{connect, execute, query_rows, query_value, table_dump};
pub use standpipe::private::{Signal, free_port};
pub use wait::{wait_for, wait_until};
