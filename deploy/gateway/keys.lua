-- The inference clients' keys. The file named by GATEWAY_CLIENTS holds one client per line,
--     client-id:sha256-of-the-key-in-hex[:expiry as Unix seconds]
-- and is read again every second, so a key is added or revoked by writing the file: no signal, no socket, no reload,
-- hence no request that could get lost. Mount the folder, not the file: a file mount keeps showing the old inode after
-- a rename.
--
-- Constant time: the proxy hashes the presented key and looks the digest up here. How long the look-up takes can only
-- tell something about the digest; nobody can choose a key by a prefix of its SHA-256, so there is no oracle on the key.

local path = os.getenv("GATEWAY_CLIENTS")
local certificate = os.getenv("GATEWAY_TLS_PEM")
local source, clients, refused = nil, {}, 0

local function read(name)
    local file, problem = io.open(name or "", "r")
    if not file then return nil, problem end
    local text = file:read("*a")
    file:close()
    return text
end

local function parse(text)
    local found, number = {}, 0
    for line in text:gmatch("[^\r\n]+") do
        number = number + 1
        if line:match("%S") and not line:match("^%s*#") then
            local id, digest, expiry = line:match("^([%w._-]+):(%x+):?(%d*)%s*$")
            if not id or #digest ~= 64 or #id > 64 then
                return nil, path .. ", line " .. number .. " is not 'client-id:sha256-in-hex[:expiry]'"
            end
            found[digest:lower()] = { id = id, expiry = tonumber(expiry) }
        end
    end
    return found
end

local function load()
    local text, problem = read(path)
    if text and text == source then return nil end
    local parsed
    if text then parsed, problem = parse(text) end
    if not parsed then return problem end
    source, clients = text, parsed
    return nil
end

local problem = load()
if problem then error("the clients file cannot be read: " .. problem) end

core.register_task(function()
    local told = nil
    while true do
        core.sleep(1)
        local wrong = load()
        refused = wrong and 1 or 0
        -- A half-written file must not lock every client out: the last good keys stay, and the operator is told once.
        if wrong and wrong ~= told then core.Alert("clients file refused, the last good one stays: " .. wrong) end
        told = wrong
    end
end)

core.register_converters("client_of", function(digest)
    local client = clients[digest]
    if not client or (client.expiry and client.expiry <= core.now().sec) then return "" end
    return client.id
end)

-- What Prometheus needs to warn before a key or the certificate runs out; HAProxy's own exporter knows neither.
core.register_service("credentials", "http", function(applet)
    local lines = {
        "# TYPE marina_gateway_clients gauge",
        "",
        "# TYPE marina_gateway_clients_file_refused gauge",
        "marina_gateway_clients_file_refused " .. refused,
        "# TYPE marina_gateway_key_expiry_timestamp_seconds gauge",
    }
    -- One sample per client: of two with the same labels Prometheus keeps either one.
    local count, soonest = 0, {}
    for _, client in pairs(clients) do
        count = count + 1
        if client.expiry then soonest[client.id] = math.min(soonest[client.id] or client.expiry, client.expiry) end
    end
    for id, expiry in pairs(soonest) do
        lines[#lines + 1] = string.format('marina_gateway_key_expiry_timestamp_seconds{client="%s"} %d', id, expiry)
    end
    lines[2] = "marina_gateway_clients " .. count
    local expiry = certificate and (read(certificate) or ""):match("not%-after (%d+)")
    if expiry then
        lines[#lines + 1] = "# TYPE marina_gateway_certificate_expiry_timestamp_seconds gauge"
        lines[#lines + 1] = "marina_gateway_certificate_expiry_timestamp_seconds " .. expiry
    end
    local body = table.concat(lines, "\n") .. "\n"
    applet:set_status(200)
    applet:add_header("content-type", "text/plain; version=0.0.4")
    applet:add_header("content-length", tostring(#body))
    applet:start_response()
    applet:send(body)
end)
