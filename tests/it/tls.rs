//! TLS to Redis and PostgreSQL: trusted certificates work, others are refused with a remedy.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::process::Command;

use crate::support::chain::{Program, RUN, Relay, SOON, Variables, look, network};
use crate::support::{Finished, Postgres, Redis, Standpipe, execute, free_port, query_value, wait_until};
use standpipe_lab::servers::RedisOptions;

/// A certificate authority of our own, and certificates that it signed.
struct Authority {
    folder: tempfile::TempDir,
}

impl Authority {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("standpipe-test-tls-").tempdir().unwrap();
        // The servers run as another user.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let authority = Self { folder };
        authority.openssl(
            "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=our-authority -keyout ca.key -out ca.pem \
             -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign",
        );
        authority
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl")
            .args(arguments.split_whitespace())
            .current_dir(self.folder.path())
            .output()
            .expect("openssl, which the package postgresql brings");
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The certificate of a server with these names, and its key.
    fn server(&self, file: &str, names: &str) -> (PathBuf, PathBuf) {
        self.openssl(&format!(
            "req -newkey rsa:2048 -nodes -subj /CN=server -keyout {file}.key -out {file}.csr"
        ));
        fs::write(self.path(&format!("{file}.ext")), format!("subjectAltName={names}\n")).unwrap();
        self.openssl(&format!(
            "x509 -req -in {file}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out {file}.pem \
             -extfile {file}.ext"
        ));
        let (certificate, key) = (self.path(&format!("{file}.pem")), self.path(&format!("{file}.key")));
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        (certificate, key)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    fn ca(&self) -> String {
        self.path("ca.pem").to_str().unwrap().to_owned()
    }
}

const OURS: &str = "DNS:localhost,IP:127.0.0.1";

/// A Redis that also speaks TLS, at this port.
async fn redis_with_tls(authority: &Authority, names: &str) -> (Redis, u16) {
    let (certificate, key) = authority.server("redis", names);
    let port = free_port().unwrap();
    let extra = vec![
        format!("tls-port {port}"),
        format!("tls-cert-file {}", certificate.display()),
        format!("tls-key-file {}", key.display()),
        "tls-auth-clients no".to_owned(),
    ];
    let options = RedisOptions { max_memory: Some(512 << 20), extra, ..RedisOptions::default() };
    (Redis::start_with(options).await, port)
}

/// A PostgreSQL that also speaks TLS, and a database on it.
async fn postgres_with_tls(authority: &Authority, names: &str) -> (Postgres, String) {
    let postgres = Postgres::start().await;
    let database = postgres.fresh_database().await;
    let data = postgres.folder().join("data");
    let owner = fs::metadata(&data).unwrap();
    let (certificate, key) = authority.server("postgres", names);
    for (from, name) in [(certificate, "server.crt"), (key, "server.key")] {
        let to = data.join(name);
        fs::copy(from, &to).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
    }
    execute(&database, "ALTER SYSTEM SET ssl = on").await;
    execute(&database, "SELECT pg_reload_conf()").await;
    wait_until("TLS", SOON, async || query_value(&database, "SHOW ssl").await == "on").await;
    (postgres, database)
}

async fn check(variables: &Variables) -> Finished {
    Standpipe::run(&["check"], variables, RUN).await
}

#[track_caller]
fn assert_says(finished: &Finished, code: i32, words: &[&str]) {
    let output = format!("{}{}", finished.stdout, finished.stderr);
    assert_eq!(finished.code, code, "{output}");
    for word in words {
        assert!(output.contains(word), "{word:?} is not in\n{output}");
    }
}

fn nobody_at_http() -> Variables {
    Variables::new().with("HTTP_ADDR", format!("127.0.0.1:{}", free_port().unwrap()))
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_tls_certificates_are_verified() {
    let authority = Authority::new();
    let (redis, port) = redis_with_tls(&authority, OURS).await;
    let url = format!("rediss://127.0.0.1:{port}");
    let untrusted = nobody_at_http().with("REDIS_URL", &url);
    let words = ["has an untrusted certificate", "UnknownIssuer", "REDIS_CA_FILE"];
    assert_says(&check(&untrusted).await, 69, &words);
    let status = Standpipe::run(&["status"], &untrusted, RUN).await;
    assert_says(&status, 69, &["UnknownIssuer"]);

    let trusted = untrusted.clone().with("REDIS_CA_FILE", authority.ca());
    assert_says(&check(&trusted).await, 0, &[&url, "noeviction"]);

    // Another authority's certificate is as good as none.
    let other = Authority::new();
    assert_says(&check(&untrusted.clone().with("REDIS_CA_FILE", other.ca())).await, 69, &words[..1]);
    // There is no way around it.
    let insecure = untrusted.clone().with("REDIS_URL", format!("{url}/#insecure"));
    assert_eq!(check(&insecure).await.code, 69);

    let plain = trusted.clone().with("REDIS_URL", format!("rediss://127.0.0.1:{}", redis.port()));
    assert_says(&check(&plain).await, 69, &["REDIS_URL"]);
    let unused = trusted.clone().with("REDIS_URL", redis.url());
    assert_says(&check(&unused).await, 0, &["REDIS_CA_FILE is set, and REDIS_URL does not use TLS"]);

    for (path, words) in [
        ("/no/such/file.pem".to_owned(), "cannot be read"),
        (authority.path("redis.csr").to_str().unwrap().to_owned(), "without any certificate"),
    ] {
        let bad = untrusted.clone().with("REDIS_CA_FILE", path);
        assert_says(&check(&bad).await, 64, &["REDIS_CA_FILE", words]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_for_another_host_is_refused() {
    let authority = Authority::new();
    let (_redis, port) = redis_with_tls(&authority, "DNS:elsewhere.example").await;
    let (_postgres, database) = postgres_with_tls(&authority, "DNS:elsewhere.example").await;
    let variables = nobody_at_http()
        .with("REDIS_URL", format!("rediss://127.0.0.1:{port}"))
        .with("REDIS_CA_FILE", authority.ca())
        .with("PGSSLROOTCERT", authority.ca());
    assert_says(&check(&variables).await, 69, &["host name from its certificate"]);

    let plain = Redis::start().await;
    let with_mode = |mode: &str| {
        variables
            .clone()
            .with("REDIS_URL", plain.url())
            .with("DATABASE_URL", format!("{database}?sslmode={mode}"))
    };
    for mode in ["require", "verify-full"] {
        let words = ["has an untrusted certificate", "DATABASE_URL", "sslmode=verify-ca"];
        assert_says(&check(&with_mode(mode)).await, 69, &words);
    }
    assert_says(&check(&with_mode("verify-ca")).await, 0, &["certificate verified, host name not checked"]);
    assert_says(&check(&with_mode("prefer")).await, 0, &["accepts any certificate"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_tls_is_verified_according_to_sslmode() {
    let authority = Authority::new();
    let redis = Redis::start().await;
    let (_postgres, database) = postgres_with_tls(&authority, OURS).await;
    let variables = nobody_at_http().with("REDIS_URL", redis.url());
    let with_mode = |mode: &str| variables.clone().with("DATABASE_URL", format!("{database}?sslmode={mode}"));

    for mode in ["require", "verify-ca", "verify-full"] {
        let untrusted = with_mode(mode);
        let words = ["has an untrusted certificate", "UnknownIssuer", "PGSSLROOTCERT"];
        assert_says(&check(&untrusted).await, 69, &words);
        let migrated = Standpipe::run(&["migrate"], &untrusted, RUN).await;
        assert_says(&migrated, 69, &["UnknownIssuer"]);
        let trusted = untrusted.clone().with("PGSSLROOTCERT", authority.ca());
        assert_says(&check(&trusted).await, 0, &["TLSv1.3, certificate", "verified"]);
        // Trusted as one of the system's authorities.
        assert_says(&check(&untrusted.with("SSL_CERT_FILE", authority.ca())).await, 0, &["TLSv1.3"]);
    }
    let in_url = authority.ca().replace('/', "%2F");
    let other = Authority::new();
    let in_url = variables
        .clone()
        .with("DATABASE_URL", format!("{database}?sslrootcert={in_url}&sslmode=verify-full"))
        .with("PGSSLROOTCERT", other.ca());
    assert_says(&check(&in_url).await, 0, &["certificate and host name verified"]);
    let missing = variables.clone().with("DATABASE_URL", format!("{database}?sslrootcert=/no/such/file"));
    assert_says(&check(&missing).await, 64, &["DATABASE_URL", "cannot be read"]);

    // Modes that promise nothing refuse nothing, and that is reported.
    for mode in ["prefer", "allow"] {
        let words = ["TLSv1.3", &format!("sslmode={mode} accepts any certificate"), "sslmode=verify-full"];
        assert_says(&check(&with_mode(mode)).await, 0, &words);
    }
    assert_says(
        &check(&variables.clone().with("DATABASE_URL", &database)).await,
        0,
        &["sslmode=prefer accepts"],
    );
    assert_says(&check(&with_mode("disable")).await, 0, &["encryption", "none"]);
    assert_says(&check(&with_mode("often")).await, 64, &["sslmode", "verify-full"]);

    let plain = Postgres::shared().await.fresh_database().await;
    let required = variables.with("DATABASE_URL", format!("{plain}?sslmode=require"));
    assert_says(&check(&required).await, 69, &["does not support TLS", "ssl = on in postgresql.conf"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_flow_over_tls_end_to_end() {
    let authority = Authority::new();
    let (redis, port) = redis_with_tls(&authority, OURS).await;
    let (_postgres, database) = postgres_with_tls(&authority, OURS).await;
    let network = network(300);
    let relay = Relay::start(&network, None).await;
    let variables = Variables::new()
        .with("RELAY_URL", relay.url())
        .with("REDIS_URL", format!("rediss://localhost:{port}"))
        .with("REDIS_CA_FILE", authority.ca())
        .with("DATABASE_URL", format!("{database}?sslmode=verify-full"))
        .with("PGSSLROOTCERT", authority.ca());
    let program = Program::start("run", &variables).await;
    wait_until("the last event", RUN, async || {
        look(&redis).await.is_ok_and(|look| look.is_finished(relay.last_seq))
    })
    .await;
    let encrypted = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                     WHERE application_name = 'standpipe'";
    assert_eq!(query_value(&database, encrypted).await, "t");
    drop(program);

    // A worker that does not trust the certificate waits and reports why; nothing is lost.
    let mut worker = Program::start("worker", &variables.clone().with("PGSSLROOTCERT", "system")).await;
    worker.wait_for_line("UnknownIssuer", SOON).await;
    assert_eq!(worker.readiness().await.0, 503);
    // One that is configured to accept any certificate reports that too.
    drop(worker);
    let lenient = variables.with("DATABASE_URL", &database).with("PGSSLROOTCERT", "system");
    let mut worker = Program::start("worker", &lenient).await;
    worker.wait_for_line("PostgreSQL's certificate is not trusted", SOON).await;
}

/// A TLS server in front of a plain-text port.
async fn with_tls(authority: &Authority, names: &str, behind: std::net::SocketAddr) -> u16 {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let (certificate, key) = authority.server("relay", names);
    let certificates = CertificateDer::pem_file_iter(certificate).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(key).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut outside) = acceptor.accept(stream).await else { return };
                let mut inside = tokio::net::TcpStream::connect(behind).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_with_a_private_certificate_authority_is_read_over_wss() {
    let authority = Authority::new();
    let relay = Relay::start(&network(200), None).await;
    let address = relay.name().parse().unwrap();
    let port = with_tls(&authority, OURS, address).await;
    let redis = Redis::start().await;
    let url = format!("wss://127.0.0.1:{port}");
    let variables = Variables::new().with("REDIS_URL", redis.url()).with("RELAY_URL", &url);
    {
        let mut untrusted = Program::start("reader", &variables).await;
        untrusted.wait_for_line("RELAY_CA_FILE", SOON).await;
    }
    for (index, (name, value)) in
        [("RELAY_CA_FILE", authority.ca()), ("SSL_CERT_FILE", authority.ca())].into_iter().enumerate()
    {
        let variables =
            variables.clone().with(name, value).with("REDIS_CURSOR_KEY", format!("cursor{index}"));
        let program = Program::start("reader", &variables).await;
        program.metric_rises("standpipe_cursor", 0.0).await;
    }
}

/// Debian's old self-signed certificates, and those of many scripts, are X.509 version 1.
#[tokio::test(flavor = "multi_thread")]
async fn an_x509_v1_certificate_is_accepted_where_any_certificate_is() {
    let authority = Authority::new();
    let (postgres, database) = postgres_with_tls(&authority, OURS).await;
    let data = postgres.folder().join("data");
    let owner = fs::metadata(&data).unwrap();
    authority.openssl("req -newkey rsa:2048 -nodes -subj /CN=old -keyout old.key -out old.csr");
    authority.openssl("x509 -req -in old.csr -signkey old.key -days 2 -out old.pem");
    let text = Command::new("openssl")
        .args(["x509", "-noout", "-text", "-in"])
        .arg(authority.path("old.pem"))
        .output();
    let text = String::from_utf8(text.unwrap().stdout).unwrap();
    assert!(text.contains("Version: 1 (0x0)"), "{text}");
    for (from, name) in [("old.pem", "server.crt"), ("old.key", "server.key")] {
        let to = data.join(name);
        fs::copy(authority.path(from), &to).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
    }
    execute(&database, "SELECT pg_reload_conf()").await;
    let with = |mode: &str| Variables::new().with("DATABASE_URL", format!("{database}?sslmode={mode}"));
    wait_until("the old certificate", SOON, async || {
        let strict = Standpipe::run(&["migrate"], &with("require"), RUN).await;
        strict.code != 0 && strict.stderr.contains("UnsupportedCertVersion")
    })
    .await;
    let lenient = Standpipe::run(&["migrate"], &with("prefer"), RUN).await;
    assert_eq!(lenient.code, 0, "{}", lenient.stderr);
}
