//! What the integration tests share: real servers, the real binary, a proxy that breaks
//! connections, and ways to wait for a condition instead of sleeping.

pub mod browser;
pub mod by_hand;
pub mod chain;
pub mod gate;
pub mod house;
mod http;
pub mod model;
pub mod old_database;
pub mod old_worker;
pub mod pooler;
mod proxy;
pub mod rabbitmq;
pub mod scripted;
mod servers;
pub mod signed;
mod sql;
pub mod stage;
mod standpipe;
pub mod traffic;

pub use http::{http_get, http_post, http_request};
pub use proxy::TcpProxy;
pub use servers::{HOSTILE_DEFAULTS, Postgres, Redis, connect_to_redis};
pub use sql::{connect, execute, query_rows, query_value, table_dump};
pub use standpipe::Standpipe;
pub use standpipe_lab::program::Finished;
pub use standpipe_lab::servers::{Signal, free_port};
pub use standpipe_lab::wait::{wait_for, wait_until};
