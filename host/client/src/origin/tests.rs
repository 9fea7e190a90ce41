use super::*;

#[test]
fn urls_are_parsed_and_shown_without_the_login() {
    for (url, shown) in [
        ("redis://localhost", "redis://localhost:6379"),
        ("rediss://user:p@ss@redis.example:1/3", "rediss://redis.example:1/3"),
        ("etcd://root:secret@[::1]", "etcd://[::1]:2379"),
        ("etcds://[::1]:9", "etcds://[::1]:9"),
        ("consul://token@127.0.0.1", "consul://127.0.0.1:8500"),
        ("consuls://127.0.0.1/", "consuls://127.0.0.1:8501"),
    ] {
        let origin: Origin = url.parse().unwrap_or_else(|error| panic!("{url}: {error}"));
        assert_eq!((origin.to_string(), format!("{origin:?}")), (shown.to_owned(), shown.to_owned()), "{url}");
    }
    for (url, reason) in [
        ("localhost", "a URL is meant"),
        ("http://localhost", "the scheme is none of"),
        ("redis://", "the host is missing"),
        ("redis://:6379", "the host is missing"),
        ("redis://localhost/all", "the database is a number"),
        ("etcd://localhost/app", "a path has no meaning"),
        ("etcd://root@localhost", "USER:PASSWORD"),
        ("consul://a:b@localhost", "the login of Consul is TOKEN"),
        ("consul://%ff@localhost", "the login is not UTF-8"),
    ] {
        let error = url.parse::<Origin>().expect_err(url);
        assert!(error.contains(reason), "{url}: {error}");
    }
}

#[test]
fn login_is_percent_decoded() {
    for (encoded, user, password) in
        [("a%3Ab:p%40s%25s", "a:b", Some("p@s%s")), (":p:s@100%", "", Some("p:s@100%")), ("token", "token", None)]
    {
        let login = Login::parse(encoded).expect(encoded);
        assert_eq!((login.user.as_str(), login.password.as_deref()), (user, password), "{encoded}");
    }
}
