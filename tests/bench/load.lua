-- Requests of a KIND to KEYS keys, with values of BYTES bytes, as wrk hands them over behind `--`.
-- The keys are any of those there are, in no order, each as likely as the others but in `GET Zipf`; only what is written to etcd
-- comes one key after the other.
local kind, keys, value
local key = 0

local digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

local function base64(text)
  local groups = text:gsub("..?.?", function(bytes)
    local a, b, c = bytes:byte(1, 3)
    local bits = a * 65536 + (b or 0) * 256 + (c or 0)
    local group = ""
    for place = 3, 0, -1 do
      local digit = math.floor(bits / 64 ^ place) % 64 + 1
      group = group .. digits:sub(digit, digit)
    end
    return group:sub(1, #bytes + 1) .. ("="):rep(3 - #bytes)
  end)
  return groups
end

local function any()
  return "key-" .. math.random(0, keys - 1)
end

-- Zipf's law with the exponent of YCSB, by the method of Gray and others that YCSB uses: the key of rank r is asked for in
-- proportion to 1 / r^0.99.
local THETA = 0.99
local zeta, eta

local function prepare_zipf()
  local sum = 0
  for rank = 1, keys do
    sum = sum + rank ^ -THETA
  end
  zeta = sum
  eta = (1 - (2 / keys) ^ (1 - THETA)) / (1 - (1 + 0.5 ^ THETA) / zeta)
end

local function popular()
  local u = math.random()
  local place = u * zeta
  local rank
  if place < 1 then
    rank = 0
  elseif place < 1 + 0.5 ^ THETA then
    rank = 1
  else
    rank = math.min(math.floor(keys * (eta * u - eta + 1) ^ (1 / (1 - THETA))), keys - 1)
  end
  return "key-" .. rank
end

-- So large a share of PUTs, the rest GETs, of keys by Zipf's law.
local function mix(puts)
  local put = math.random() < puts
  return wrk.format(put and "PUT" or "GET", "/v1/" .. popular(), nil, put and value or nil)
end

local kinds = {
  GET = function() return wrk.format("GET", "/v1/" .. any()) end,
  ["GET Zipf"] = function() return wrk.format("GET", "/v1/" .. popular()) end,
  PUT = function() return wrk.format("PUT", "/v1/" .. any(), nil, value) end,
  ["YCSB A"] = function() return mix(0.5) end,
  ["YCSB B"] = function() return mix(0.05) end,
  -- Nine GETs to a PUT.
  mixed = function()
    local put = math.random(10) == 1
    return wrk.format(put and "PUT" or "GET", "/v1/" .. any(), nil, put and value or nil)
  end,
  -- The gateway of etcd has two calls, and bytes in base64.
  ["etcd GET"] = function()
    return wrk.format("POST", "/v3/kv/range", nil, '{"key":"' .. base64(any()) .. '"}')
  end,
  ["etcd PUT"] = function()
    key = (key + 1) % keys
    return wrk.format("POST", "/v3/kv/put", nil, '{"key":"' .. base64("key-" .. key) .. '","value":"' .. value .. '"}')
  end,
}

function init(args)
  kind, keys = args[1], tonumber(args[2])
  value = ("x"):rep(tonumber(args[3]))
  if kind == "etcd PUT" then
    value = base64(value)
  end
  math.randomseed(os.time())
  if kind == "GET Zipf" or kind:find("^YCSB") then
    prepare_zipf()
  end
  request = kinds[kind]
end

function done(summary, latency)
  local errors = summary.errors
  print(string.format("result %d %d %d", summary.requests, summary.duration,
    errors.connect + errors.read + errors.write + errors.timeout + errors.status))
  print(string.format("failures: connect %d, read %d, write %d, timeout %d, status %d",
    errors.connect, errors.read, errors.write, errors.timeout, errors.status))
  print(string.format("latency %d %d %d %d", latency:percentile(50), latency:percentile(99),
    latency:percentile(99.9), latency.max))
end
