"""Where arrays live: logical axes, rule tables, the device mesh, rematerialisation and process
start-up."""
