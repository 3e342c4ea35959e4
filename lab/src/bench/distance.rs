//! A database that is further away: a TCP proxy that holds what is sent to it.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// Listens on a free port of this machine and passes everything on to `server`: what goes there after `round_trip`, what
/// comes back at once. Returns the port. It ends with the process.
///
/// Threads, because the timers of the runtime know whole milliseconds only.
///
/// # Errors
///
/// No port is free.
pub fn far(server: SocketAddr, round_trip: Duration) -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("a port for the proxy")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // A connection that cannot be made is closed, as by a server that refuses it.
            let _ = pass(client, server, round_trip);
        }
    });
    Ok(port)
}

fn pass(client: TcpStream, server: SocketAddr, round_trip: Duration) -> Result<()> {
    let server = TcpStream::connect(server)?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
    let (mut from, mut back) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if sender.send((Instant::now() + round_trip, buffer[..length].to_vec())).is_err() {
                break;
            }
        }
    });
    thread::spawn(move || {
        let mut to = server;
        for (due, bytes) in receiver {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        let mut to = client;
        let _ = std::io::copy(&mut back, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_arrive_delayed_and_in_order() {
        let server = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = far(server.local_addr().unwrap(), Duration::from_millis(30)).unwrap();
        let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (mut accepted, _) = server.accept().unwrap();
        let began = Instant::now();
        client.write_all(b"first ").unwrap();
        client.write_all(b"second").unwrap();
        let mut received = [0; 12];
        accepted.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"first second");
        assert!(began.elapsed() >= Duration::from_millis(30));
        accepted.write_all(b"answer").unwrap();
        client.read_exact(&mut received[..6]).unwrap();
        // The end comes through, too.
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(accepted.read(&mut received).unwrap(), 0);
    }
}
