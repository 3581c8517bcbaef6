// Tests follow with the folder fixtures.
