//! A real browser, headless, driven over its own protocol (<https://chromedevtools.github.io/devtools-protocol/>).

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use standpipe_lab::servers::{command_for_life, spawn_for_life};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use standpipe_lab::wait::wait_for;

const NAMES: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];
const SOON: Duration = Duration::from_secs(30);

/// How the page is viewed.
#[derive(Clone, Copy, Debug)]
pub struct View {
    pub width: u32,
    pub dark: bool,
}

/// A browser with one page; it is killed on drop.
pub struct Browser {
    child: Child,
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    session: Value,
    next_id: u64,
    /// Exceptions, logged errors and policy violations of the page.
    pub complaints: Vec<String>,
    _folder: TempDir,
}

fn program() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).flat_map(|folder| NAMES.map(|name| folder.join(name)));
    found.into_iter().find(|file| file.is_file()).expect("no Chromium in PATH; `make test-ui` installs it")
}

impl Browser {
    pub async fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("standpipe-test-browser-").tempdir().unwrap();
        let log = folder.path().join("stderr");
        let mut command = command_for_life(&program()).unwrap();
        command
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .args(["--hide-scrollbars", "--remote-debugging-port=0", "--lang=en-GB"])
            .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
            .arg("about:blank")
            .env("TZ", "UTC")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .process_group(0);
        let child = spawn_for_life(command).unwrap();
        let url = wait_for("the browser to listen", SOON, async || {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let line = said.lines().find_map(|line| line.strip_prefix("DevTools listening on "));
            line.map(str::to_owned).ok_or(said)
        })
        .await;
        let (socket, _) = tokio_tungstenite::connect_async(url).await.unwrap();
        let mut browser =
            Self { child, socket, session: Value::Null, next_id: 0, complaints: Vec::new(), _folder: folder };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"})).await;
        let target = json!({"targetId": target["targetId"], "flatten": true});
        browser.session = browser.call("Target.attachToTarget", target).await["sessionId"].clone();
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({})).await;
        }
        browser
    }

    /// Calls a method and returns its result.
    pub async fn call(&mut self, method: &str, params: Value) -> Value {
        self.next_id += 1;
        let id = self.next_id;
        let mut message = json!({"id": id, "method": method, "params": params});
        if !self.session.is_null() {
            message["sessionId"] = self.session.clone();
        }
        self.socket.send(Message::text(message.to_string())).await.unwrap();
        tokio::time::timeout(SOON, async {
            loop {
                let Some(Ok(message)) = self.socket.next().await else {
                    panic!("{method}: the browser is gone")
                };
                let Message::Text(text) = message else { continue };
                let message: Value = serde_json::from_str(&text).unwrap();
                if message["id"] == id {
                    assert!(message["error"].is_null(), "{method}: {}", message["error"]);
                    return message["result"].clone();
                }
                self.note(&message);
            }
        })
        .await
        .unwrap_or_else(|_| panic!("{method}: no answer"))
    }

    fn note(&mut self, message: &Value) {
        match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => self.complaints.push(message["params"].to_string()),
            Some("Log.entryAdded") if message["params"]["entry"]["level"] == "error" => {
                let entry = &message["params"]["entry"];
                // The browser logs every unsuccessful response as an error; some tests provoke them.
                if entry["source"] != "network" {
                    self.complaints.push(entry.to_string());
                }
            }
            _ => {}
        }
    }

    /// Sets how the page is viewed from now on.
    pub async fn view(&mut self, view: View) {
        let metrics =
            json!({"width": view.width, "height": 900, "deviceScaleFactor": 1, "mobile": view.width < 600});
        self.call("Emulation.setDeviceMetricsOverride", metrics).await;
        let scheme = if view.dark { "dark" } else { "light" };
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", media).await;
    }

    pub async fn open(&mut self, url: &str) {
        self.call("Page.navigate", json!({"url": url})).await;
        self.until("the page to be live", "document.getElementById('live')?.textContent === 'live'").await;
    }

    /// The value of an expression; promises are awaited.
    pub async fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({"expression": expression, "awaitPromise": true, "returnByValue": true, "userGesture": true});
        let result = self.call("Runtime.evaluate", params).await;
        assert!(result["exceptionDetails"].is_null(), "{expression}: {}", result["exceptionDetails"]);
        result["result"]["value"].clone()
    }

    /// Waits until an expression is true.
    pub async fn until(&mut self, what: &str, expression: &str) {
        let began = std::time::Instant::now();
        while self.evaluate(expression).await != json!(true) {
            assert!(
                began.elapsed() < SOON,
                "waited in vain for {what}: {expression}; the page says: {}",
                self.text("main").await
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The text of the first element that matches.
    pub async fn text(&mut self, selector: &str) -> String {
        let text = self.evaluate(&format!("document.querySelector({selector:?})?.innerText")).await;
        text.as_str().unwrap_or_default().to_owned()
    }

    /// Clicks the middle of the first element that matches, as a mouse does.
    pub async fn click(&mut self, selector: &str) {
        let at = self
            .evaluate(&format!(
                "(() => {{ const e = document.querySelector({selector:?}); e.scrollIntoView({{block: 'center'}});
                   const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})()"
            ))
            .await;
        for kind in ["mousePressed", "mouseReleased"] {
            let mouse = json!({"type": kind, "x": at[0], "y": at[1], "button": "left", "clickCount": 1});
            self.call("Input.dispatchMouseEvent", mouse).await;
        }
    }

    /// How long the page has been busy since it was opened; `Performance` must be enabled.
    pub async fn busy_seconds(&mut self) -> f64 {
        let metrics = self.call("Performance.getMetrics", json!({})).await;
        let metrics = metrics["metrics"].as_array().unwrap();
        metrics.iter().find(|metric| metric["name"] == "TaskDuration").unwrap()["value"].as_f64().unwrap()
    }

    /// Types into the focused element.
    pub async fn write(&mut self, text: &str) {
        self.call("Input.insertText", json!({"text": text})).await;
    }

    /// Presses and releases a key.
    pub async fn press(&mut self, key: &str) {
        for kind in ["keyDown", "keyUp"] {
            let text = if key == "Enter" { "\r" } else { "" };
            let code = if key == "Enter" { 13 } else { 0 };
            let event =
                json!({"type": kind, "key": key, "code": key, "text": text, "windowsVirtualKeyCode": code});
            self.call("Input.dispatchKeyEvent", event).await;
        }
    }

    /// Takes a screenshot of the whole page.
    pub async fn screenshot(&mut self, file: &Path) {
        // From the top, with the pointer out of the way.
        self.evaluate("scrollTo(0, 0)").await;
        let mouse = json!({"type": "mouseMoved", "x": 1, "y": 1});
        self.call("Input.dispatchMouseEvent", mouse).await;
        let size = self.call("Page.getLayoutMetrics", json!({})).await["cssContentSize"].clone();
        let params = json!({
            "format": "png",
            "captureBeyondViewport": true,
            "clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1},
        });
        let picture = self.call("Page.captureScreenshot", params).await;
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, from_base64(picture["data"].as_str().unwrap())).unwrap();
    }

    /// Takes a screenshot of the visible part of the page; dialogs are in its middle.
    pub async fn screenshot_of_window(&mut self, file: &Path) {
        let picture = self.call("Page.captureScreenshot", json!({"format": "png"})).await;
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, from_base64(picture["data"].as_str().unwrap())).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn from_base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for byte in text.bytes().filter(|byte| *byte != b'=') {
        let digit = ALPHABET.iter().position(|c| *c == byte).unwrap();
        bits = (bits << 6) | u32::try_from(digit).unwrap();
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes
}
