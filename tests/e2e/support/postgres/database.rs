//! PostgreSQL server of one test, on a free port.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::{NamedTempFile, TempDir};

use crate::support::certificates::Pair;
use crate::support::server::{PATIENCE, Process};

pub const PASSWORD: &str = "p:a%s+s wörd";

pub struct Database {
    data: TempDir,
    port: u16,
    /// None while it is down.
    process: Option<Process>,
}

/// Directory of the programs of the newest version.
fn programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let newest = versions.map(|version| version.expect("it can be listed").path().join("bin")).max();
    newest.expect("PostgreSQL is installed; `just test` does that")
}

/// One of its programs, as another user than root, which PostgreSQL refuses.
fn program(name: &str) -> Command {
    as_owner(&programs().join(name))
}

/// A program as the owner of a database.
pub fn as_owner(program: &Path) -> Command {
    if !geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=KILL", "--"]).arg(program);
    command
}

/// Gives the file to the owner of the database.
pub fn give(path: &Path) {
    if geteuid().is_root() {
        let home = fs::metadata("/var/lib/postgresql").expect("its package made a home for it");
        chown(path, Some(home.uid()), Some(home.gid())).expect("root may do that");
    }
}

impl Database {
    pub fn start() -> Self {
        let data = TempDir::new().expect("a temporary directory can be made");
        give(data.path());
        let password = data.path().with_extension("password");
        fs::write(&password, PASSWORD).expect("a file can be written");
        let mut command = program("initdb");
        command.args(["--no-sync", "-U", "postgres", "-E", "UTF8", "--locale=C", "-A", "scram-sha-256", "--pwfile"]);
        let made = command.arg(&password).arg("-D").arg(data.path().join("cluster")).stdout(Stdio::null()).output();
        fs::remove_file(&password).expect("it is there");
        let made = made.expect("initdb can be run");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Self::start_in(data)
    }

    fn start_in(data: TempDir) -> Self {
        // Both names that tests have for this machine.
        let line = |host| format!("{host}:*:*:*:{}\n", PASSWORD.replace(':', "\\:"));
        fs::write(data.path().join("passwords"), ["127.0.0.1", "elsewhere.example"].map(line).concat())
            .expect("a file can be written");
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let mut database = Self { data, port: free.expect("a port is free").port(), process: None };
        database.start_again();
        database
    }

    /// Creates a synchronous standby: from now on every commit waits for it.
    pub fn replicate(&self) -> Self {
        let data = TempDir::new().expect("a temporary directory can be made");
        give(data.path());
        let mut copy = program("pg_basebackup");
        copy.args([
            "-h",
            "127.0.0.1",
            "-p",
            &self.port.to_string(),
            "-U",
            "postgres",
            "--checkpoint=fast",
            "--no-sync",
        ]);
        copy.args(["-R", "-D"]).arg(data.path().join("cluster")).env("PGPASSWORD", PASSWORD);
        let copied = copy.output().expect("pg_basebackup can be run");
        assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
        let standby = Self::start_in(data);
        self.becomes("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'", "1");
        self.configure("synchronous_standby_names", "*");
        self.becomes("SELECT sync_state FROM pg_stat_replication", "sync");
        standby
    }

    /// Sets a parameter of the whole server while it runs.
    pub fn configure(&self, name: &str, value: &str) {
        self.sql(&format!("ALTER SYSTEM SET {name} = '{value}'"));
        self.sql("SELECT pg_reload_conf()");
        self.becomes(&format!("SHOW {name}"), value);
    }

    /// Promotes a standby to primary.
    pub fn promote(&self) {
        assert_eq!(self.sql("SELECT pg_promote()"), ["t"]);
    }

    /// Waits until this many commits wait for an unavailable synchronous standby.
    pub fn waits_for_standby(&self) {
        self.becomes("SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'", "t");
    }

    /// Starts it when it is down, with retries, since processes of a killed one can remain for a moment.
    pub fn start_again(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let is_standby = self.data.path().join("cluster/standby.signal").exists();
        let said = if is_standby { "ready to accept read-only connections" } else { "ready to accept connections" };
        while self.process.is_none() {
            let mut command = program("postgres");
            command.arg("-D").arg(self.data.path().join("cluster")).args([
                "-p",
                &self.port.to_string(),
                "-h",
                "127.0.0.1",
            ]);
            command
                .args(["-c", "unix_socket_directories=", "-c", "lc_messages=C", "-c", "max_connections=300"])
                .stdout(Stdio::null());
            let process = Process::spawn(command);
            let ready = process.stderr.find(|line| line.contains(said).then_some(()));
            match ready {
                Ok(()) => self.process = Some(process),
                Err(all) => assert!(Instant::now() < deadline, "the database does not start; it said:\n{all}"),
            }
        }
    }

    /// From now on it offers TLS.
    pub fn serve_tls(&self, pair: &Pair) {
        for (name, file) in [("certificate", &pair.certificate), ("key", &pair.key)] {
            let copy = self.data.path().join(name);
            fs::copy(file, &copy).expect("the directory takes a file");
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o600)).expect("it is the test's");
            give(&copy);
            let setting = if name == "key" { "ssl_key_file" } else { "ssl_cert_file" };
            self.sql(&format!("ALTER SYSTEM SET {setting} = '{}'", copy.display()));
        }
        self.sql("ALTER SYSTEM SET ssl = on");
        self.sql("SELECT pg_reload_conf()");
        self.becomes("SHOW ssl", "on");
    }

    /// From now on this user can authenticate only with a certificate of this authority.
    pub fn asks_for_certificates(&self, user: &str, authority: &str) {
        let (rules, copy) = (self.data.path().join("cluster/pg_hba.conf"), self.data.path().join("authority"));
        fs::copy(authority, &copy).expect("the directory takes a file");
        give(&copy);
        self.sql(&format!("ALTER SYSTEM SET ssl_ca_file = '{}'", copy.display()));
        let others = fs::read_to_string(&rules).expect("initdb made it");
        // The first matching line counts.
        fs::write(&rules, format!("hostssl all {user} 127.0.0.1/32 cert\n{others}")).expect("it is the test's");
        self.sql("SELECT pg_reload_conf()");
        self.becomes("SHOW ssl_ca_file", &copy.display().to_string());
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// URL for kvs.
    pub fn url(&self) -> String {
        self.url_at(self.port)
    }

    /// URL through a proxy on another port.
    pub fn url_at(&self, port: u16) -> String {
        let passwords = self.data.path().join("passwords");
        format!("postgres://postgres@127.0.0.1:{port}/postgres?sslmode=disable&passfile={}", passwords.display())
    }

    /// Creates another database, and returns its URL.
    pub fn create(&self, name: &str) -> String {
        self.sql(&format!("CREATE DATABASE {name}"));
        self.url().replace("/postgres?", &format!("/{name}?"))
    }

    /// The schema of the log and its rows, as SQL.
    pub fn dump(&self) -> Vec<u8> {
        let mut dump = self.client("pg_dump");
        let dumped = dump.args(["--schema=kvs", "postgres"]).output().expect("pg_dump can be run");
        assert!(dumped.status.success(), "{}", String::from_utf8_lossy(&dumped.stderr));
        dumped.stdout
    }

    /// Runs SQL in one of its databases.
    pub fn load(&self, name: &str, statements: &[u8]) {
        let mut file = NamedTempFile::new().expect("a temporary file can be made");
        file.write_all(statements).expect("it takes what is written");
        let loaded = self.psql().args(["-d", name, "-o", "/dev/null", "-f"]).arg(file.path()).output();
        let loaded = loaded.expect("psql can be run");
        assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    }

    /// Kills it, and starts it with recovery from an empty archive.
    pub fn recover(&mut self) {
        self.sql("ALTER SYSTEM SET restore_command = 'false'");
        self.kill();
        let signal = self.data.path().join("cluster/recovery.signal");
        fs::write(&signal, "").expect("it is the test's");
        give(&signal);
        self.start_again();
    }

    /// SIGKILL of the main process; the processes of connections end by themselves.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("it is running");
        process.signal(Signal::KILL);
        process.wait();
    }

    /// Stops or continues it with all its processes.
    pub fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("it is running");
        process.signal(signal);
        for child in process.children() {
            // A process that has ended needs no signal.
            let _ = kill_process(Pid::from_raw(child).expect("a process has a number"), signal);
        }
    }

    fn psql(&self) -> Command {
        let mut psql = self.client("psql");
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1"]).env("PGOPTIONS", "-c client_min_messages=warning");
        psql
    }

    /// One of the programs that connect to it.
    fn client(&self, name: &str) -> Command {
        let mut client = Command::new(programs().join(name));
        client.args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-U", "postgres"]).env("PGPASSWORD", PASSWORD);
        client
    }

    /// Runs SQL, and returns the rows, with | between columns.
    pub fn sql(&self, statements: &str) -> Vec<String> {
        self.sql_in("postgres", statements)
    }

    /// As `sql`, in another of its databases.
    pub fn sql_in(&self, name: &str, statements: &str) -> Vec<String> {
        let ran = self.psql().args(["-d", name, "-c", statements]).output().expect("psql can be run");
        assert!(ran.status.success(), "{statements}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8(ran.stdout).expect("it is text").lines().map(str::to_owned).collect()
    }

    /// Waits until a query returns this.
    pub fn becomes(&self, query: &str, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.sql(query) != [wanted] {
            assert!(Instant::now() < deadline, "{query} never gave {wanted}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Locks the table exclusively until this is dropped.
    pub fn lock(&self, table: &str) -> Process {
        let mut psql = self.psql();
        psql.args(["-c", &format!("BEGIN; LOCK TABLE {table}; SELECT pg_sleep(600)")]);
        let process = Process::spawn(psql);
        let held = format!(
            "SELECT count(*) FROM pg_locks WHERE relation = '{table}'::regclass AND mode = 'AccessExclusiveLock'"
        );
        self.becomes(&format!("{held} AND granted"), "1");
        process
    }
}
