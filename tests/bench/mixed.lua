-- Nine GETs to a PUT, of 100 bytes, at random keys of so many that are all there.
local value = string.rep("x", 100)
local keys

function init(args)
  keys = tonumber(args[1])
end

function request()
  local path = "/v1/key-" .. math.random(0, keys - 1)
  if math.random(10) == 1 then
    return wrk.format("PUT", path, nil, value)
  end
  return wrk.format("GET", path)
end

function done(summary, latency)
  local errors = summary.errors
  print(string.format("result %d %d %d", summary.requests, summary.duration,
    errors.connect + errors.read + errors.write + errors.timeout + errors.status))
  print(string.format("latency %d %d %d %d", latency:percentile(50), latency:percentile(99),
    latency:percentile(99.9), latency.max))
end
