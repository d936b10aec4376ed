-- The canary: which share of the requests without a version goes to a version that is not the default yet. The file
-- named by GATEWAY_SPLITS, beside the clients' keys, holds one line per model,
--     NAME VERSION PERCENT EXPIRY        (percent 0 to 100, expiry as Unix seconds)
-- and is read again four times a second: no signal, no socket, no reload. An entry past its expiry counts as absent, so
-- that a rollout that was killed takes its canary with it. No file, no canary.
--
-- Which requests: the next term of the golden-ratio sequence, spread evenly over any stretch of requests (a share of 1 %
-- is 1 of about 100, never a run of bad luck) and in step with nothing that clients do.

local path = os.getenv("GATEWAY_SPLITS")
local step = (math.sqrt(5) - 1) / 2
local source, splits, term = nil, {}, 0

local function parse(text)
    local found, number = {}, 0
    for line in text:gmatch("[^\r\n]+") do
        number = number + 1
        local name, version, percent, expiry = line:match("^(%S+) (%d[%d.]*) (%d+%.?%d*) (%d+)$")
        percent = tonumber(percent)
        if not percent or percent > 100 then
            return nil, path .. ", line " .. number .. " is not 'NAME VERSION PERCENT EXPIRY'"
        end
        found[name] = { version = version, share = percent / 100, expiry = tonumber(expiry) }
    end
    return found
end

local function load()
    local file = io.open(path or "", "r")
    local text = file and file:read("*a") or ""
    if file then file:close() end
    if text == source then return end
    source = text
    local parsed, problem = parse(text)
    -- The default version is always right, so what cannot be read means no canary.
    if problem then core.Alert("splits file refused, no canary runs: " .. problem) end
    splits = parsed or {}
end

load()
core.register_task(function()
    while true do
        core.msleep(250)
        load()
    end
end)

-- path of a prediction -> the version that it shall go to instead of the default one, or an empty string
core.register_converters("canary_of", function(path)
    if next(splits) == nil then return "" end
    local split = splits[path:match("^/predictions/([^/]+)$")]
    if not split or split.expiry <= core.now().sec then return "" end
    term = (term + step) % 1
    if term >= split.share then return "" end
    return split.version
end)
