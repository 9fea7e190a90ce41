-- GET of one of the 10,000 keys that the PUTs left behind.
local key = 0

function request()
  key = (key + 1) % 10000
  return wrk.format("GET", "/v1/key-" .. key)
end

function done(summary)
  local errors = summary.errors
  print(string.format("result %d %d %d", summary.requests, summary.duration,
    errors.connect + errors.read + errors.write + errors.timeout + errors.status))
end
