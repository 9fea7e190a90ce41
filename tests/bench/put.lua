-- PUT of 100 bytes to one of 10,000 keys. The keys go round, so that the GETs that follow find them all.
local key = 0
local value = string.rep("x", 100)

function request()
  key = (key + 1) % 10000
  return wrk.format("PUT", "/v1/key-" .. key, nil, value)
end

function done(summary)
  local errors = summary.errors
  print(string.format("result %d %d %d", summary.requests, summary.duration,
    errors.connect + errors.read + errors.write + errors.timeout + errors.status))
end
