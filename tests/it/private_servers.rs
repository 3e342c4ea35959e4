//! The private servers and the harness itself: a test that relies on a fault must be able to
//! rely on the fault happening.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{
    Postgres, Redis, Signal, Standpipe, TcpProxy, connect, execute, free_port, http_get, query_rows,
    query_value, table_dump, wait_for, wait_until,
};
use standpipe_lab::servers::{
    AppendFsync, PostgresOptions, PrivateFolder, PrivatePostgres, PrivateRedis, RedisOptions,
    command_for_life, spawn_for_life,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const SOON: Duration = Duration::from_mins(1);
/// Where the child process that the tests kill reports what it has started.
const REPORT: &str = "STANDPIPE_TEST_REPORT";
/// Set if that child is to freeze its servers.
const FROZEN: &str = "STANDPIPE_TEST_FROZEN";

fn is_gone(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // A zombie only waits for its parent; where pid 1 reaps nothing, it stays.
        Ok(stat) => stat.rsplit_once(')').unwrap().1.trim_start().starts_with('Z'),
        Err(_) => true,
    }
}

async fn set(redis: &Redis, key: &str, value: &str) {
    let _: () =
        redis::cmd("SET").arg(key).arg(value).query_async(&mut redis.connection().await).await.unwrap();
}

async fn get(redis: &Redis, key: &str) -> Option<String> {
    redis::cmd("GET").arg(key).query_async(&mut redis.connection().await).await.unwrap()
}

#[tokio::test]
async fn redis_keeps_its_data_across_a_crash() {
    let mut redis = Redis::start_with(RedisOptions {
        append_fsync: AppendFsync::Always,
        max_memory: Some(64 << 20),
        extra: vec!["client-output-buffer-limit normal 0 0 0".to_owned()],
        ..RedisOptions::default()
    })
    .await;
    set(&redis, "key", "value").await;
    let (url, pid) = (redis.url(), redis.pid().unwrap());

    redis.sigkill().await.unwrap();
    assert!(is_gone(pid));
    assert_eq!(redis.pid(), None);
    assert!(redis::Client::open(url.clone()).unwrap().get_multiplexed_async_connection().await.is_err());

    redis.start_again().await.unwrap();
    assert_eq!(redis.url(), url);
    assert_ne!(redis.pid(), Some(pid));
    assert_eq!(get(&redis, "key").await.as_deref(), Some("value"));

    let policy: Vec<String> = redis::cmd("CONFIG")
        .arg(&["GET", "maxmemory*"])
        .query_async(&mut redis.connection().await)
        .await
        .unwrap();
    assert!(
        policy.contains(&"noeviction".to_owned()) && policy.contains(&(64 << 20).to_string()),
        "{policy:?}"
    );
}

#[tokio::test]
async fn redis_loses_writes_cut_from_its_append_only_file() {
    let mut redis = Redis::start().await;
    set(&redis, "early", "1").await;
    set(&redis, "late", "2").await;
    assert!(redis.truncate_aof_tail(1).is_err(), "the file was cut under a running server");

    redis.stop().await.unwrap();
    assert_eq!(redis.truncate_aof_tail(1).unwrap(), 1);
    redis.start_again().await.unwrap();
    assert_eq!(get(&redis, "early").await.as_deref(), Some("1"));
    assert_eq!(get(&redis, "late").await, None);

    // More than there is: everything is cut, and the result is how much that was.
    redis.stop().await.unwrap();
    let length = fs::metadata(redis.aof_paths().unwrap().last().unwrap()).unwrap().len();
    assert_eq!(redis.truncate_aof_tail(u64::MAX).unwrap(), length);
    redis.start_again().await.unwrap();
    assert_eq!(get(&redis, "early").await, None);
}

#[tokio::test]
async fn redis_without_an_append_only_file_starts_empty() {
    let mut redis = Redis::start_with(RedisOptions { append_only: false, ..RedisOptions::default() }).await;
    set(&redis, "key", "value").await;
    redis.stop().await.unwrap();
    assert!(redis.truncate_aof_tail(1).is_err());
    redis.start_again().await.unwrap();
    assert_eq!(get(&redis, "key").await, None);
}

#[tokio::test]
async fn a_paused_redis_answers_only_once_resumed() {
    let mut redis = Redis::start().await;
    let mut connection = redis.connection().await;
    redis.pause().await.unwrap();
    let ping = redis::cmd("PING");
    let frozen =
        tokio::time::timeout(Duration::from_millis(200), ping.query_async::<String>(&mut connection)).await;
    assert!(frozen.is_err(), "a frozen server answered: {frozen:?}");
    redis.resume().unwrap();
    assert_eq!(get(&redis, "key").await, None);
}

#[tokio::test]
async fn postgres_keeps_committed_rows_across_a_crash() {
    let mut postgres = Postgres::start().await;
    let url = postgres.fresh_database().await;
    execute(&url, "CREATE TABLE t (id int, name text); INSERT INTO t VALUES (2, NULL), (1, 'one')").await;
    let open = connect(&url).await;
    open.batch_execute("BEGIN; INSERT INTO t VALUES (3, 'never committed')").await.unwrap();
    let pids = postgres.all_pids();
    assert!(pids.len() > 3 && pids.contains(&postgres.pid().unwrap()), "{pids:?}");

    postgres.sigkill().await.unwrap();
    assert!(pids.iter().all(|pid| is_gone(*pid)));
    assert!(open.batch_execute("SELECT 1").await.is_err());

    postgres.start_again().await.unwrap();
    let rows =
        [[Some("1"), Some("one")], [Some("2"), None]].map(|row| row.map(|v| v.map(str::to_owned)).to_vec());
    assert_eq!(table_dump(&url, "t", "id, name").await, rows);
    assert_eq!(query_value(&url, "SHOW fsync").await, "on");

    postgres.stop_fast().await.unwrap();
    postgres.start_again().await.unwrap();
    assert_eq!(query_rows(&url, "SELECT 1; SELECT count(*) FROM t").await, [[Some("2".to_owned())]]);
}

#[tokio::test]
async fn a_paused_postgres_answers_only_once_resumed() {
    let mut postgres = Postgres::start().await;
    let url = postgres.fresh_database().await;
    let open = connect(&url).await;
    postgres.pause().await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(200), open.batch_execute("SELECT 1")).await.is_err());
    assert!(tokio::time::timeout(Duration::from_millis(200), connect(&url)).await.is_err());
    postgres.resume().unwrap();
    open.batch_execute("SELECT 1").await.unwrap();
    // Dropping it while it is paused must not hang.
    postgres.pause().await.unwrap();
}

#[tokio::test]
async fn a_database_can_be_copied_from_another() {
    let postgres = Postgres::shared().await;
    let original = postgres.fresh_database().await;
    execute(&original, "CREATE TABLE t AS SELECT 7 AS n").await;
    let name = original.rsplit('/').next().unwrap();
    let copy = postgres.fresh_database_from(name).await;
    assert_ne!(copy, original);
    assert_eq!(query_value(&copy, "SELECT n FROM t").await, "7");
}

#[tokio::test]
async fn two_servers_of_the_same_kind_run_side_by_side() {
    let (one, two) = tokio::join!(Redis::start(), Redis::start());
    set(&one, "key", "one").await;
    set(&two, "key", "two").await;
    assert_eq!(get(&one, "key").await.as_deref(), Some("one"));

    let (three, four) = (Postgres::shared().await, Postgres::start().await);
    assert_ne!(three.port(), four.port());
    let (three, four) = (three.fresh_database().await, four.fresh_database().await);
    assert_ne!(
        query_value(&three, "SHOW data_directory").await,
        query_value(&four, "SHOW data_directory").await
    );
}

#[tokio::test]
async fn a_second_server_in_the_same_folder_is_refused_and_the_first_keeps_running() {
    let redis = Redis::start().await;
    let error = PrivateRedis::start(redis.folder(), RedisOptions::default()).await.unwrap_err();
    assert!(format!("{error:#}").contains("in use by another private server"), "{error:#}");
    assert_eq!(get(&redis, "key").await, None);
}

#[tokio::test]
async fn a_server_that_fails_to_start_reports_its_log() {
    let folder = PrivateFolder::create("standpipe-test-failing").unwrap();
    let broken = RedisOptions { extra: vec!["no-such-setting yes".to_owned()], ..RedisOptions::default() };
    let error = PrivateRedis::start(&folder.path().join("redis"), broken).await.unwrap_err();
    assert!(format!("{error:#}").contains("no-such-setting"), "{error:#}");

    let broken = PostgresOptions {
        settings: vec![("no_such_setting".to_owned(), "yes".to_owned())],
        ..Postgres::options()
    };
    let error = PrivatePostgres::start(&folder.path().join("postgres"), broken).await.unwrap_err();
    assert!(format!("{error:#}").contains("no_such_setting"), "{error:#}");
}

#[tokio::test]
async fn a_port_in_use_is_an_error_only_if_it_was_requested() {
    let redis = Redis::start().await;
    let folder = PrivateFolder::create("standpipe-test-port").unwrap();
    let same = RedisOptions { port: Some(redis.port()), ..RedisOptions::default() };
    let error = PrivateRedis::start(folder.path(), same).await.unwrap_err();
    assert!(format!("{error:#}").contains("Address already in use"), "{error:#}");
    assert_ne!(free_port().unwrap(), redis.port());
}

#[tokio::test]
async fn dropping_a_server_removes_its_processes_and_files() {
    let redis = Redis::start().await;
    let postgres = Postgres::start().await;
    let pids: Vec<u32> = redis.pid().into_iter().chain(postgres.all_pids()).collect();
    let folders = [redis.folder().to_path_buf(), postgres.folder().to_path_buf()];
    drop(redis);
    drop(postgres);
    assert!(pids.iter().all(|pid| is_gone(*pid)));
    assert!(!folders.iter().any(|folder| folder.exists()), "{folders:?}");
}

/// Not a test: the child process of the two tests below, which start it and kill it.
#[tokio::test]
#[ignore = "the child process of other tests"]
async fn child_that_is_killed() {
    let Some(report) = std::env::var_os(REPORT).map(PathBuf::from) else {
        return;
    };
    // On a thread that ends, because the servers must not depend on it.
    let (redis, postgres) = tokio::task::spawn_blocking(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { (Redis::start().await, Postgres::start().await) })
    })
    .await
    .unwrap();
    let (mut redis, mut postgres) = (redis, postgres);
    if std::env::var_os(FROZEN).is_some() {
        redis.pause().await.unwrap();
        postgres.pause().await.unwrap();
    }
    let pids: Vec<String> =
        redis.pid().into_iter().chain(postgres.all_pids()).map(|pid| pid.to_string()).collect();
    let half = report.with_extension("half");
    let text =
        [pids.join(" "), redis.folder().display().to_string(), postgres.folder().display().to_string()];
    fs::write(&half, text.join("\n")).unwrap();
    fs::rename(half, report).unwrap();
    std::future::pending::<()>().await;
}

async fn kill_a_process_that_has_servers(frozen: bool) {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    // Ends with this process even if this test fails.
    let mut command = command_for_life(&std::env::current_exe().unwrap()).unwrap();
    command
        .args(["--exact", "private_servers::child_that_is_killed", "--ignored", "--nocapture"])
        .env(REPORT, &report)
        .stdout(Stdio::null());
    if frozen {
        command.env(FROZEN, "yes");
    }
    let mut child = spawn_for_life(command).unwrap();
    let text = wait_for("the child's servers", SOON, async || {
        assert!(child.try_wait().unwrap().is_none(), "the child has ended");
        fs::read_to_string(&report)
    })
    .await;
    let mut lines = text.lines();
    let pids: Vec<u32> = lines.next().unwrap().split(' ').map(|pid| pid.parse().unwrap()).collect();
    let folders: Vec<&Path> = lines.map(Path::new).collect();
    // Redis and the postmaster come first; the others may include a server process that has just finished.
    assert!(pids.len() > 4 && pids[..2].iter().all(|pid| !is_gone(*pid)), "{pids:?}");
    assert_eq!(folders.len(), 2);
    assert!(folders.iter().all(|folder| folder.is_dir()));

    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("the servers and their folders to go with the process that started them", SOON, async || {
        let left: Vec<_> = pids.iter().filter(|pid| !is_gone(**pid)).collect();
        let folders: Vec<_> = folders.iter().filter(|folder| folder.exists()).collect();
        if left.is_empty() && folders.is_empty() { Ok(()) } else { Err(format!("{left:?} {folders:?}")) }
    })
    .await;
}

#[tokio::test]
async fn a_killed_process_leaves_no_server_behind() {
    kill_a_process_that_has_servers(false).await;
}

#[tokio::test]
async fn a_killed_process_leaves_no_frozen_server_behind() {
    kill_a_process_that_has_servers(true).await;
}

#[tokio::test]
async fn the_proxy_cuts_and_refuses_connections_and_counts_both() {
    let redis = Redis::start().await;
    let proxy = TcpProxy::for_url(&redis.url()).await;
    let client = redis::Client::open(proxy.url_through(&redis.url())).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let ping = redis::cmd("PING");
    assert_eq!(ping.query_async::<String>(&mut connection).await.unwrap(), "PONG");
    assert_eq!((proxy.connections(), proxy.cuts(), proxy.refused()), (1, 0, 0));
    assert!(proxy.forwarded_bytes() > 0);

    assert_eq!(proxy.cut_all().await, 1);
    assert_eq!(proxy.cuts(), 1);
    assert!(ping.query_async::<String>(&mut connection).await.is_err());
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    assert_eq!(proxy.connections(), 2);

    proxy.refuse(true);
    assert!(client.get_multiplexed_async_connection().await.is_err());
    assert!(proxy.refused() >= 1);
    assert_eq!(ping.query_async::<String>(&mut connection).await.unwrap(), "PONG");
    proxy.refuse(false);
    client.get_multiplexed_async_connection().await.unwrap();
}

#[tokio::test]
async fn a_cut_resets_the_connection_rather_than_closing_it() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = TcpProxy::start(server.local_addr().unwrap().to_string()).await;
    let mut client = TcpStream::connect(proxy.address()).await.unwrap();
    let (mut accepted, _) = server.accept().await.unwrap();
    client.write_all(b"x").await.unwrap();
    assert_eq!(accepted.read_u8().await.unwrap(), b'x');

    assert_eq!(proxy.cut_all().await, 1);
    assert_eq!(client.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(accepted.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn the_proxy_swallows_everything_while_it_is_a_black_hole() {
    let postgres = Postgres::shared().await;
    let url = postgres.fresh_database().await;
    let proxy = TcpProxy::for_url(&url).await;
    let through = proxy.url_through(&url);
    let client = connect(&through).await;
    client.batch_execute("SELECT 1").await.unwrap();

    proxy.black_hole(true).await;
    let silent = Duration::from_millis(200);
    assert!(tokio::time::timeout(silent, client.batch_execute("SELECT 1")).await.is_err());
    assert!(tokio::time::timeout(silent, connect(&through)).await.is_err());
    assert!(proxy.swallowed_bytes() > 0);

    proxy.black_hole(false).await;
    assert!(proxy.cuts() >= 1);
    assert!(client.batch_execute("SELECT 1").await.is_err());
    assert_eq!(query_value(&through, "SELECT 1").await, "1");
}

#[tokio::test]
async fn the_proxy_delays_traffic() {
    let redis = Redis::start().await;
    let proxy = TcpProxy::for_url(&redis.url()).await;
    let client = redis::Client::open(proxy.url_through(&redis.url())).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    proxy.delay(Duration::from_millis(50));
    let started = Instant::now();
    let _: String = redis::cmd("PING").query_async(&mut connection).await.unwrap();
    assert!(started.elapsed() >= Duration::from_millis(100), "{:?}", started.elapsed());
}

#[tokio::test]
async fn http_responses_are_read_plain_and_chunked() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = server.local_addr().unwrap();
    let answers = [
        "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nlate",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n",
    ];
    let serve = async {
        for answer in answers {
            let (mut stream, _) = server.accept().await.unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).await.unwrap();
            assert!(request[..length].starts_with(b"GET /readyz HTTP/1.1\r\n"));
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    };
    let ask =
        async { (http_get(address, "/readyz").await.unwrap(), http_get(address, "/readyz").await.unwrap()) };
    let ((), (first, second)) = tokio::join!(serve, ask);
    assert_eq!(first, (503, "late".to_owned()));
    assert_eq!(second, (200, "hello!".to_owned()));
    drop(server);
    assert!(http_get(address, "/readyz").await.is_err());
}

#[tokio::test]
#[should_panic(expected = "in vain for: the moon to be green; looked")]
async fn a_wait_that_times_out_names_its_condition() {
    wait_until("the moon to be green", Duration::from_millis(50), async || false).await;
}

#[tokio::test]
async fn a_command_for_life_can_be_signalled() {
    let mut command = command_for_life(Path::new("/bin/sh")).unwrap();
    command.args(["-c", "trap 'exit 7' TERM; while :; do sleep 0.01; done"]);
    let mut child = spawn_for_life(command).unwrap();
    let pid = child.id();
    wait_until("the shell to run", SOON, async || {
        fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap().starts_with("/bin/sh")
    })
    .await;
    // The trap may not be set yet; then the signal itself ends the shell.
    standpipe_lab::servers::send_signal(Signal::Term, &[pid]).unwrap();
    let status =
        wait_for("the shell to end", SOON, async || child.try_wait().unwrap().ok_or("it runs")).await;
    assert!(!status.success());
}

#[tokio::test]
async fn the_real_binary_prints_its_version() {
    let none: [(&str, &str); 0] = [];
    let finished = Standpipe::run(&["--version"], &none, SOON).await;
    assert_eq!(finished.code, 0, "{finished:?}");
    assert!(finished.stdout.contains(env!("CARGO_PKG_VERSION")), "{finished:?}");
}
