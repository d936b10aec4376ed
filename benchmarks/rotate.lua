-- wrk's part: bodies from a folder, one after the other, and the result as one JSON line.
-- wrk -s rotate.lua URL -- FOLDER COUNT CONTENT_TYPE [HEADER VALUE]...   the bodies are FOLDER/0 ... FOLDER/(COUNT-1)
local bodies, position = {}, 0

function init(args)
   local folder, count = args[1], tonumber(args[2])
   for index = 0, count - 1 do
      local file = assert(io.open(folder .. "/" .. index, "rb"))
      bodies[index] = file:read("*a")
      file:close()
   end
   wrk.method = "POST"
   wrk.headers["Content-Type"] = args[3]
   for index = 4, #args, 2 do
      wrk.headers[args[index]] = args[index + 1]
   end
   requests = {}
   for index = 0, count - 1 do
      requests[index] = wrk.format(nil, nil, nil, bodies[index])
   end
   total = count
end

function request()
   local chosen = requests[position]
   position = (position + 1) % total
   return chosen
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      'RESULT {"microseconds": %d, "requests": %d, "refused": %d, "broken": %d, "late": %d, "mean_us": %.1f, ' ..
      '"p50_us": %d, "p90_us": %d, "p99_us": %d, "max_us": %d}\n',
      summary.duration, summary.requests, errors.status, errors.connect + errors.read + errors.write, errors.timeout,
      latency.mean, latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max))
end
