pytest_plugins = ["inductor_x86q.pytest_plugin"]
